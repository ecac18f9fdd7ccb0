"""How a turn becomes a reply: the runner owns the tasks, the engine is one turn from claim to end."""
