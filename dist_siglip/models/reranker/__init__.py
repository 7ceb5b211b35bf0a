"""The fusion head that looks at a picture and a text side by side."""
