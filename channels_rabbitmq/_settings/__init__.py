"""The options of a layer: read, checked, and told what is wrong with them."""
