"""``pagemerge.Cache`` behind other interfaces. Each module needs the package it is named after."""
