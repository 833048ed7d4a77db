"""The scale-in guard: its core, against a stand-in of the API server, and with real workers.

rules           which pods KEDA, the HPA and the ReplicaSet want and remove, by their published rules
kubernetes_api  a stand-in of the API server, over HTTP
cluster         pods that are real processes, scaled by the rules
load            the tasks of a run, drawn from a seed
first_result    from zero to the first result, beside the bare engine
__main__        `make scale-in`
"""
