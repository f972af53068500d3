"""The attention core: role shares and steering, and the two exact ways to compute both."""
