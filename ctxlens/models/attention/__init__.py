"""The attention core: role shares, steering, and the two ways of computing both exactly."""
