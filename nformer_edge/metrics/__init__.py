"""CMC, mAP, re-ranking, bootstrap intervals, agreement and gates. Needs numpy alone."""
