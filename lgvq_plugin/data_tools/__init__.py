"""Commands around data: `lgvq data check`, `lgvq data convert`, `lgvq cache`."""
