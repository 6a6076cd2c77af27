"""Running a model with a policy: the dispatch, the session, the backends."""
