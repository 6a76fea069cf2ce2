"""What a person reads of a run: the panel while it trains, one page when it is done."""
