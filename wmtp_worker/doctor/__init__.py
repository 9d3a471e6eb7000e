"""Is this machine, with these settings, fit to train? Each check looks for itself and says what to do."""
