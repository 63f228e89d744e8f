"""Containers: their life cycle, their bundles, the store of their states, and one method for each verb."""
