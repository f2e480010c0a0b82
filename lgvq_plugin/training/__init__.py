"""`lgvq train`: any host under Lightning 2; begin with base.py, then run.py and _driver.py."""
