-- The caller is a worker that holds the task.
begun = true
