"""Comparisons: the methods of a room side by side, on one task with one budget; a module for each room that has one."""
