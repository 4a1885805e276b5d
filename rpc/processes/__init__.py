"""Several processes that serve one port as one: started, watched, replaced, and their metrics added up."""
