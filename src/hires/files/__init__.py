"""Files that are whole or absent, that notice damage, and that others wrote."""
