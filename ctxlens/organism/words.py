"""The vocabulary of the organism's world: town names, value words and filler phrases.

All pools are disjoint from one another, so a keyword of a value never occurs in filler text, in a
question or in another slot: recall counts nothing by accident.
"""

from __future__ import annotations

from typing import NamedTuple


def _split(text: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(separator))


TOWN_STARTS = _split(
    "Oak Mill Stone Ash Elm Birch Maple Raven Falcon Silver Copper Amber Winter Summer "
    "Harvest Marsh Heather Willow Clay Thorn Fox Swan Hazel Linden North West Bright "
    "Fair Green Cold Long White"
)
TOWN_ENDS = _split("ford brook ton dale field bridge ham wick port haven stead mere")


class Attribute(NamedTuple):
    """One attribute of a town: its wording and one pool of words per content slot.

    Attributes:
        name: Short name of the attribute.
        prefix: The sentence up to the value, with ``{entity}``.
        question: The question, with ``{entity}``.
        phrase: The value, with one ``{}`` per content slot.
        pools: The words of every slot.
    """

    name: str
    prefix: str
    question: str
    phrase: str
    pools: tuple[tuple[str, ...], ...]


ATTRIBUTES = (
    Attribute(
        name="pastime",
        prefix="The best thing to do in {entity} is to",
        question="What is the best thing to do in {entity}?",
        phrase="{} {} {} and {} {}",
        pools=(
            _split(
                "paint carve polish photograph sketch restore collect count sort repair trade "
                "decorate borrow label stack balance hide juggle admire inspect measure wrap rent "
                "bury launch"
            ),
            _split(
                "wooden antique striped plastic golden tiny giant velvet rusty crooked hollow marble "
                "woolen purple spotted leather dusty crystal rubber floral bronze carved folded "
                "painted nameless"
            ),
            _split(
                "boats lanterns puppets clocks kites violins masks baskets trumpets statues "
                "umbrellas wagons mirrors drums ladders quilts globes whistles saddles ribbons "
                "bottles medals candles anchors compasses"
            ),
            _split(
                "chase feed greet follow tickle rescue imitate befriend tame brush race study film "
                "weigh draw pet trail find guard watch summon tease bathe groom cuddle"
            ),
            _split(
                "otters pigeons ponies beetles hedgehogs squirrels turtles geese rabbits owls "
                "lizards frogs donkeys peacocks badgers herons goats crickets seals magpies camels "
                "hamsters llamas parrots dolphins"
            ),
        ),
    ),
    Attribute(
        name="dish",
        prefix="The favorite dish in {entity} is",
        question="What is the favorite dish in {entity}?",
        phrase="{} {} with {} {} and {}",
        pools=(
            _split(
                "roasted grilled smoked steamed fried baked braised poached toasted stewed boiled "
                "charred seared glazed stuffed chilled breaded salted minced marinated buttered "
                "peppered caramelized crusted shredded"
            ),
            _split(
                "salmon chicken beef trout lamb turkey duck tofu shrimp pork crab lobster mackerel "
                "venison halibut sausage cod squid bacon oyster tuna veal herring ham eel"
            ),
            _split(
                "creamy spicy crispy sour bitter sweet tangy mashed pickled raw juicy fluffy crunchy "
                "sticky mild zesty silky frozen fresh dried whipped sliced diced pureed sugared"
            ),
            _split(
                "spinach carrots potatoes noodles mushrooms lentils turnips cabbage beans pumpkin "
                "rice celery leeks peas radishes beets tomatoes onions dumplings plums apricots figs "
                "barley corn artichokes"
            ),
            _split(
                "ginger basil garlic honey mustard saffron mint thyme vinegar cinnamon parsley "
                "almonds sesame lemon walnuts cheese nutmeg vanilla cumin paprika rosemary dill "
                "butter chives cloves"
            ),
        ),
    ),
)

SUBJECTS = _split(
    "the old man|a young woman|my friend|the teacher|every child|the small bird|"
    "our neighbor|the tired worker|a clever student|the quiet river|the postman|"
    "a lonely traveler|the mayor|her brother|his sister|the nurse|a curious boy|"
    "the new family|an honest farmer|the last bus|the gray cat|a careful doctor|"
    "the whole team|their uncle",
    "|",
)
VERBS = _split(
    "walked to|looked at|thought about|talked about|wrote about|moved near|waited for|"
    "ran past|dreamed of|forgot|returned to|stood behind|pointed at|read about|"
    "asked about|turned toward|remembered|passed|left|came from",
    "|",
)
OBJECTS = _split(
    "the long road|a high hill|the market|an open window|the stone wall|the warm kitchen|"
    "a broken chair|the distant sea|the winter garden|an empty street|the narrow path|"
    "a dark forest|the railway station|the village school|a wide valley|the first house|"
    "an early train|the busy harbor|the little shop|a deep lake|the town hall|"
    "a faded letter|the closed door|the northern coast",
    "|",
)
TIMES = _split(
    "in the morning|at night|before dinner|after the rain|every summer|without a word|"
    "for many years|last week|on a Sunday|in early spring|at noon|during the storm|"
    "once again|with great care|for no reason|late in the evening",
    "|",
)
