"""The page and the pictures that show what a loop made."""
