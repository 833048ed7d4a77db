# All images of the Dockerfile, from the repository's root:
#
#   docker buildx bake                     # for the CPU
#   docker buildx bake gpu                 # for an NVIDIA GPU
#   docker buildx bake ocr ocr-gpu         # these two
#   REGISTRY=registry.example.com/ TAG=0.1.0 docker buildx bake cpu gpu --push --sbom=true --provenance=mode=max
#
# A variable of the environment replaces the value of the variable below with its name. `--print` builds nothing and
# shows what would be built. `--sbom=true` adds a list of Debian's packages to a pushed image. For another base image:
# --set '*.args.PYTHON_IMAGE=NAME:TAG@sha256:DIGEST'

# What stands before the images' names, with the slash at its end.
variable "REGISTRY" {
  default = ""
}

variable "TAG" {
  default = "latest"
}

# The URL of the package index with Paddle's builds for GPUs. ocr-gpu and ner-gpu need it.
variable "PADDLE_INDEX" {
  default = ""
}

group "default" {
  targets = ["cpu"]
}

target "cpu" {
  matrix = {
    image = ["gateway", "callbacks", "echo", "ocr", "ner", "facefusion", "acestep"]
  }
  name   = image
  target = image
  tags   = ["${REGISTRY}inferq-${image}:${TAG}"]
}

target "gpu" {
  matrix = {
    image = ["ocr-gpu", "ner-gpu", "facefusion-gpu", "acestep-gpu"]
  }
  name      = image
  target    = image
  tags      = ["${REGISTRY}inferq-${image}:${TAG}"]
  platforms = ["linux/amd64"]
  args = {
    PADDLE_INDEX = PADDLE_INDEX
  }
}
