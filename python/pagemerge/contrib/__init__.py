"""``pagemerge.Cache`` behind the interfaces of others. Each module needs the package it is named
after."""
