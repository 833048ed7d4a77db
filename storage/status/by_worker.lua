-- The caller is a worker that has the task in hand.
begun = true
