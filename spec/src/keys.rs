//! Public halves of keys, and strict signature verification.

use ed25519_dalek::VerifyingKey;

use crate::{bytes::hex_newtype, hash::hash};

hex_newtype!(
    /// An Ed25519 public key (RFC 8032): of a signer, an agent's identity, an invite or the recovery.
    ///
    /// Any 32 bytes; whether they are a sound key is decided where a signature is verified.
    IdentityKey,
    32
);
hex_newtype!(
    /// An Ed25519 signature (RFC 8032).
    Signature,
    64
);
hex_newtype!(
    /// An X25519 public key (RFC 7748): the static key of an agent in the Noise handshake.
    StaticPublicKey,
    32
);

/// A signature that does not hold: wrong key, wrong text, or a key or signature that is not canonical.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("signature does not verify")]
pub struct BadSignature;

/// The bytes that are signed: `"connect/v1 " || kind || 0x00 || body`.
#[must_use]
pub fn signed_text(kind: &str, body: &[u8]) -> Vec<u8> {
    [b"connect/v1 ", kind.as_bytes(), &[0], body].concat()
}

impl IdentityKey {
    /// Verifies `signature` over `body` as an object of `kind`.
    ///
    /// # Errors
    /// [`BadSignature`], whatever the cause.
    ///
    /// # Security
    /// Strict verification: small-order keys and points, non-canonical encodings and
    /// malleable scalars are refused, so all implementations agree on what is valid.
    pub fn verify(
        &self,
        kind: &str,
        body: &[u8],
        signature: &Signature,
    ) -> Result<(), BadSignature> {
        VerifyingKey::from_bytes(&self.0)
            .and_then(|key| {
                let signature = ed25519_dalek::Signature::from_bytes(&signature.0);
                key.verify_strict(&signed_text(kind, body), &signature)
            })
            .map_err(|_| BadSignature)
    }
}

/// The public half of a wrap key: what the realm secret M and the name key source W are wrapped to.
///
/// An X25519 key and an ML-KEM-768 encapsulation key (FIPS 203); both must be broken to open a wrap.
#[derive(Clone, PartialEq, Eq)]
pub struct WrapPublicKey {
    /// X25519 public key.
    pub x25519: [u8; 32],
    /// ML-KEM-768 encapsulation key.
    pub ml_kem: Box<[u8; ML_KEM_768_EK_BYTES]>,
}

/// Length of an ML-KEM-768 encapsulation key (FIPS 203, table 3).
pub const ML_KEM_768_EK_BYTES: usize = 1184;
/// Length of an ML-KEM-768 ciphertext (FIPS 203, table 3).
pub const ML_KEM_768_CT_BYTES: usize = 1088;

impl WrapPublicKey {
    /// Length of the encoding in bytes: `x25519 32 || ml_kem 1184`.
    pub const BYTES: usize = 32 + ML_KEM_768_EK_BYTES;

    /// Encodes as `x25519 32 || ml_kem 1184`.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        [self.x25519.as_slice(), self.ml_kem.as_slice()].concat()
    }

    /// Decodes what [`WrapPublicKey::encode`] wrote; `None` when the length is another.
    #[must_use]
    pub fn decode(raw: &[u8]) -> Option<Self> {
        let (x25519, ml_kem) = raw.split_first_chunk::<32>()?;
        let ml_kem: &[u8; ML_KEM_768_EK_BYTES] = ml_kem.try_into().ok()?;
        Some(Self { x25519: *x25519, ml_kem: Box::new(*ml_kem) })
    }

    /// `H("wrap-key", x25519 || ml_kem)`: what a NoiseKey or a credential binds.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        hash("wrap-key", &[&self.x25519, self.ml_kem.as_slice()])
    }
}

impl std::fmt::Debug for WrapPublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WrapPublicKey({})", hex::encode(self.hash()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_order_key_verifies_nothing() {
        // The identity point: with it a non-strict verifier accepts a signature of zeros.
        let mut identity_point = [0; 32];
        identity_point[0] = 1;
        let mut forged = [0; 64];
        forged[0] = 1;
        assert_eq!(
            IdentityKey(identity_point).verify("entry", b"anything", &Signature(forged)),
            Err(BadSignature)
        );
    }

    #[test]
    fn wrap_key_has_one_length() {
        let key = WrapPublicKey { x25519: [7; 32], ml_kem: Box::new([9; ML_KEM_768_EK_BYTES]) };
        let wire = key.encode();
        assert_eq!(WrapPublicKey::decode(&wire), Some(key));
        assert_eq!(WrapPublicKey::decode(&wire[1..]), None);
        assert_eq!(WrapPublicKey::decode(&[wire.as_slice(), &[0]].concat()), None);
    }
}
