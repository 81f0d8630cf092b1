"""How weights become E4M3 numbers where the nearest is not the best."""
