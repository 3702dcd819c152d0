"""Figures and tables from the files that training wrote; nothing here knows a network."""
