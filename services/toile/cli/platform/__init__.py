"""The platform on one machine: the parts, who starts them, who watches them, who stops them."""
