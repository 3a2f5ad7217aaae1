#!/bin/sh
# Validates the manifests without a cluster: kustomize builds each overlay, and kubernetes-validate checks the result against the JSON
# schemas of Kubernetes, which it brings along. Then one mistake for each is planted, which both have to find.
#
# kustomize is built with go, kubernetes-validate installed with Python's pip, once, into target/tools.
set -eu
cd "$(dirname "$0")/../.."

kustomize_version=v5.8.1
validate_version=1.37.0
# The oldest Kubernetes that has all that the manifests use.
kubernetes=1.34
tools=$PWD/target/tools

say() { echo "kubernetes: $*" >&2; }

kustomize=$tools/bin/kustomize
if [ ! -x "$kustomize" ]; then
    command -v go >/dev/null || { say "kustomize is built with go, and there is none: install it"; exit 3; }
    say "building kustomize $kustomize_version with go into $tools; this takes a minute or two, once"
    GOBIN=$tools/bin go install "sigs.k8s.io/kustomize/kustomize/v5@$kustomize_version"
fi
validate=$tools/kubernetes-validate-$validate_version/bin/kubernetes-validate
if [ ! -x "$validate" ]; then
    command -v python3 >/dev/null || { say "kubernetes-validate takes Python 3, and there is none: install it"; exit 3; }
    say "installing kubernetes-validate $validate_version with pip into $tools, about 15 MB to download"
    python3 -m venv "${validate%/bin/*}"
    "${validate%/*}/pip" install --quiet --disable-pip-version-check "kubernetes-validate==$validate_version"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
valid() { "$validate" --kubernetes-version "$kubernetes" --strict --quiet "$1"; }

for overlay in infra/kubernetes/lv?; do
    built=$work/${overlay##*/}.yaml
    "$kustomize" build "$overlay" >"$built"
    valid "$built"
    if grep -q '^kind: Secret' "$built"; then
        say "$overlay has a secret in it: name one that the cluster has"
        exit 1
    fi
    say "$overlay is valid for Kubernetes $kubernetes: $(grep -c '^kind: ' "$built") objects"
done

sed 's/maxUnavailable: 1$/maxUnavailabel: 1/' "$work/lv2.yaml" >"$work/misspelt.yaml"
if valid "$work/misspelt.yaml" >/dev/null 2>&1; then say "a misspelt field is not found: this check checks nothing"; exit 1; fi
cp -R infra/kubernetes "$work/copy"
sed -i.old 's/behavior: merge/behavior: merges/' "$work/copy/lv2/kustomization.yaml"
if "$kustomize" build "$work/copy/lv2" >/dev/null 2>&1; then say "a broken overlay is not found: this check checks nothing"; exit 1; fi
