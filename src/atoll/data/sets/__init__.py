"""The named sets, one file per family; `atoll.data.catalogue` finds and loads them by name."""
