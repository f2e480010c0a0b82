"""`lgvq train`: any host under Lightning 2; begin with run.py, then driver.py."""
