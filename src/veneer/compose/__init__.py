"""How parts are combined: gates here; stacking is the order in which a host applies its parts."""
