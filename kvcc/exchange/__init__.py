"""What other engines can read: their formats, where a plan can be expressed in them."""
