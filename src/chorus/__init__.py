"""K LoRA agents over one shared, frozen base. Importing the package imports nothing heavy."""
