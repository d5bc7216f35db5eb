#!/usr/bin/env bash
# Makes the certificates of the TLS tests, valid from 2020 to 2120, so that tests need no openssl. The keys protect nothing.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
cat > "$work/config" << END
[ca]
default_ca = any
[any]
database = $work/index
new_certs_dir = $work
rand_serial = yes
default_md = sha256
policy = names
[names]
commonName = supplied
[authority]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[server]
subjectAltName = DNS:localhost,IP:127.0.0.1
keyUsage = digitalSignature
authorityKeyIdentifier = keyid
END
touch "$work/index"
sign=(openssl ca -batch -notext -config "$work/config" -startdate 20200101000000Z -enddate 21200101000000Z)
for name in ca other server; do
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$name.key" -out "$work/$name" -subj "/CN=$name"
done
for name in ca other; do
    "${sign[@]}" -selfsign -keyfile "$name.key" -extensions authority -in "$work/$name" -out "$name.crt"
done
"${sign[@]}" -cert ca.crt -keyfile ca.key -extensions server -in "$work/server" -out server.crt
openssl ec -in server.key -out locked.key -aes256 -passout pass:s3cret
rm other.key
