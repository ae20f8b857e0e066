"""The tools of records; a package, so that no other one called `records` comes before it."""
