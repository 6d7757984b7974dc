//! ML-KEM-768 (FIPS 203) and X25519 (RFC 7748), reduced to what the protocol needs.

use connect_spec::keys::{ML_KEM_768_CT_BYTES, ML_KEM_768_EK_BYTES};
use ml_kem::{Decapsulate, Encapsulate, KeyExport, ml_kem_768};
use rand_core::CryptoRng;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize, Zeroizing};

use crate::secret::{self, redacted};

/// Bytes of an encapsulation key.
pub(crate) type EncapsulationKey = Box<[u8; ML_KEM_768_EK_BYTES]>;
/// Bytes of a ciphertext.
pub(crate) type Ciphertext = [u8; ML_KEM_768_CT_BYTES];

/// The private half; ml-kem wipes it on drop.
pub(crate) struct Decapsulator(Box<ml_kem_768::DecapsulationKey>);

redacted!(Decapsulator);

impl Decapsulator {
    pub(crate) fn generate(rng: &mut impl CryptoRng) -> Self {
        Self::from_seed(&secret::random(rng))
    }

    /// Expands the seed `d || z`.
    pub(crate) fn from_seed(seed: &[u8; 64]) -> Self {
        let mut seed = ml_kem::Seed::from(*seed);
        let key = Box::new(ml_kem_768::DecapsulationKey::from_seed(seed));
        seed.as_mut_slice().zeroize();
        Self(key)
    }

    pub(crate) fn encapsulation_key(&self) -> EncapsulationKey {
        Box::new(self.0.encapsulation_key().to_bytes().into())
    }

    /// Never fails: a wrong ciphertext gives a secret that nobody else has (FIPS 203 section 6.3).
    pub(crate) fn decapsulate(&self, ciphertext: &Ciphertext) -> Zeroizing<[u8; 32]> {
        let mut shared = self.0.decapsulate(&(*ciphertext).into());
        let secret = Zeroizing::new(shared.into());
        shared.as_mut_slice().zeroize();
        secret
    }
}

/// Encapsulates a fresh secret; `None` when the key is not canonical (FIPS 203 section 7.2).
pub(crate) fn encapsulate(
    key: &[u8; ML_KEM_768_EK_BYTES],
    rng: &mut impl CryptoRng,
) -> Option<(Box<Ciphertext>, Zeroizing<[u8; 32]>)> {
    let key = ml_kem_768::EncapsulationKey::new(&(*key).into()).ok()?;
    let (ciphertext, mut shared) = key.encapsulate_with_rng(rng);
    let secret = Zeroizing::new(shared.into());
    shared.as_mut_slice().zeroize();
    Some((Box::new(ciphertext.into()), secret))
}

/// The X25519 public key of a secret.
pub(crate) fn x25519_public(secret: &[u8; 32]) -> [u8; 32] {
    PublicKey::from(&StaticSecret::from(*secret)).to_bytes()
}

/// X25519; `None` when the result is all zeros, as a small-order public key makes it.
pub(crate) fn x25519(secret: &[u8; 32], public: [u8; 32]) -> Option<Zeroizing<[u8; 32]>> {
    let shared = StaticSecret::from(*secret).diffie_hellman(&PublicKey::from(public));
    shared.was_contributory().then(|| Zeroizing::new(shared.to_bytes()))
}
