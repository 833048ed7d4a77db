"""The manifests of k8s/, rendered and read without a cluster."""
