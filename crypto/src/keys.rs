//! Long-lived keys: signing, static, wrap and recovery. PROTOCOL.md, "Keys".

use bip39::{Language, Mnemonic};
use connect_spec::{
    keys::{IdentityKey, Signature, StaticPublicKey, WrapPublicKey, signed_text},
    log::Recovery,
    signed::{Body, ObjectError, Signed},
};
use ed25519_dalek::Signer;
use rand_core::CryptoRng;
use zeroize::{Zeroize, Zeroizing};

use crate::{
    kem::{self, Decapsulator},
    secret::{self, Secret, redacted},
};

/// An Ed25519 key (RFC 8032) of a signer, an agent's identity or an invite.
pub struct SigningKey {
    seed: Secret<32>,
    public: IdentityKey,
}

impl SigningKey {
    /// Draws a fresh key.
    #[must_use]
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        Self::from_boxed(secret::random(rng))
    }

    /// Takes a key out of custody.
    #[must_use]
    pub fn from_seed(seed: Zeroizing<[u8; 32]>) -> Self {
        Self::from_boxed(secret::boxed(&seed))
    }

    fn from_boxed(seed: Secret<32>) -> Self {
        let public = IdentityKey(expand(&seed).verifying_key().to_bytes());
        Self { seed, public }
    }

    /// The seed, for custody on disk.
    #[must_use]
    pub fn seed(&self) -> &Zeroizing<[u8; 32]> {
        &self.seed
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> IdentityKey {
        self.public
    }

    /// Signs `object`, which this key alone signs.
    ///
    /// # Panics
    /// When the object breaks a rule of its own kind; see [`SigningKey::try_sign`].
    pub fn sign<T: Body>(&self, object: &T) -> Signed<T> {
        self.try_sign(object).expect("the caller built an object that its own kind admits")
    }

    /// Signs `object`, part of which came from elsewhere and may break a rule of its kind.
    ///
    /// # Errors
    /// [`ObjectError`] when no reader would accept the object.
    pub fn try_sign<T: Body>(&self, object: &T) -> Result<Signed<T>, ObjectError> {
        let body = object.encode();
        let signature = self.sign_text(T::KIND, &body);
        Signed::new(body, vec![(self.public, signature)])
    }

    /// Signs `body` as an object of `kind`.
    #[must_use]
    pub fn sign_text(&self, kind: &str, body: &[u8]) -> Signature {
        Signature(expand(&self.seed).sign(&signed_text(kind, body)).to_bytes())
    }
}

/// The expanded key wipes itself too; it is cheap to make and lives for one call.
fn expand(seed: &Secret<32>) -> ed25519_dalek::SigningKey {
    ed25519_dalek::SigningKey::from_bytes(seed)
}

/// The X25519 key (RFC 7748) that an agent's Noise handshakes use.
pub struct StaticKeypair {
    secret: Secret<32>,
    public: StaticPublicKey,
}

impl StaticKeypair {
    /// Draws a fresh key.
    #[must_use]
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        Self::from_boxed(secret::random(rng))
    }

    /// Takes a key out of custody.
    #[must_use]
    pub fn from_secret(secret: Zeroizing<[u8; 32]>) -> Self {
        Self::from_boxed(secret::boxed(&secret))
    }

    fn from_boxed(secret: Secret<32>) -> Self {
        let public = StaticPublicKey(kem::x25519_public(&secret));
        Self { secret, public }
    }

    /// The secret half, for custody on disk.
    #[must_use]
    pub fn secret(&self) -> &Zeroizing<[u8; 32]> {
        &self.secret
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> StaticPublicKey {
        self.public
    }
}

/// The key that epochs are wrapped to: X25519 and ML-KEM-768 together.
pub struct WrapKeypair {
    seed: Secret<96>,
    public: WrapPublicKey,
}

impl WrapKeypair {
    /// Draws a fresh key.
    #[must_use]
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        Self::from_boxed(secret::random(rng))
    }

    /// Takes a key out of custody: `x25519 32 || ml-kem d 32 || z 32`.
    #[must_use]
    pub fn from_seed(seed: Zeroizing<[u8; 96]>) -> Self {
        Self::from_boxed(secret::boxed(&seed))
    }

    fn from_boxed(seed: Secret<96>) -> Self {
        let (x25519, ml_kem) = split(&seed);
        let public = WrapPublicKey {
            x25519: kem::x25519_public(x25519),
            ml_kem: Decapsulator::from_seed(ml_kem).encapsulation_key(),
        };
        Self { seed, public }
    }

    /// The seed, for custody on disk.
    #[must_use]
    pub fn seed(&self) -> &Zeroizing<[u8; 96]> {
        &self.seed
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> WrapPublicKey {
        self.public.clone()
    }

    pub(crate) fn x25519(&self) -> &[u8; 32] {
        split(&self.seed).0
    }

    pub(crate) fn decapsulator(&self) -> Decapsulator {
        Decapsulator::from_seed(split(&self.seed).1)
    }
}

fn split(seed: &[u8; 96]) -> (&[u8; 32], &[u8; 64]) {
    let (x25519, ml_kem) = seed.split_first_chunk().expect("96 bytes begin with 32");
    (x25519, ml_kem.try_into().expect("96 - 32 = 64"))
}

/// The Ed25519 key that can restart a trust log, kept by people as 24 words.
pub struct RecoveryKey(SigningKey);

redacted!(SigningKey, StaticKeypair, WrapKeypair, RecoveryKey);

/// Words of a recovery key: 256 bits and a checksum (BIP-39).
const RECOVERY_WORDS: usize = 24;
/// Bytes of the longest word in the BIP-39 English list, and a space.
const LONGEST_WORD_BYTES: usize = 8 + 1;

/// Why words are not a recovery key. Never quotes a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WordsError {
    /// Another number of words.
    #[error("recovery words are {RECOVERY_WORDS}, not {0}")]
    Count(usize),
    /// A word, counted from one, that is not in the BIP-39 English list.
    #[error("word {0} is not in the list of recovery words")]
    Unknown(usize),
    /// All words are in the list, but one of them is not the right one, or two are swapped.
    #[error("recovery words do not belong together: one is wrong or out of order")]
    Checksum,
}

impl RecoveryKey {
    /// Draws a fresh key.
    #[must_use]
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        Self(SigningKey::generate(rng))
    }

    /// The key as 24 words of the BIP-39 English list: the seed is the entropy.
    #[must_use]
    pub fn words(&self) -> Zeroizing<String> {
        let mnemonic = Mnemonic::from_entropy(self.0.seed().as_slice())
            .expect("32 bytes are a length that BIP-39 knows");
        let mut words = Zeroizing::new(String::with_capacity(RECOVERY_WORDS * LONGEST_WORD_BYTES));
        for word in mnemonic.words() {
            if !words.is_empty() {
                words.push(' ');
            }
            words.push_str(word);
        }
        words
    }

    /// Reads 24 words, separated by white space, in any case.
    ///
    /// # Errors
    /// [`WordsError`]: tells people where to look, and repeats no word.
    pub fn from_words(words: &str) -> Result<Self, WordsError> {
        let words = Zeroizing::new(words.to_ascii_lowercase());
        let count = words.split_whitespace().count();
        if count != RECOVERY_WORDS {
            return Err(WordsError::Count(count));
        }
        let mnemonic =
            Mnemonic::parse_in_normalized(Language::English, &words).map_err(|error| {
                if let bip39::Error::UnknownWord(index) = error {
                    WordsError::Unknown(index + 1)
                } else {
                    WordsError::Checksum
                }
            })?;
        let (mut entropy, _) = mnemonic.to_entropy_array();
        let mut seed = Box::new(Zeroizing::new([0; 32]));
        seed.copy_from_slice(&entropy[..32]);
        entropy.zeroize();
        Ok(Self(SigningKey::from_boxed(seed)))
    }

    /// Signs the entry that starts a trust log anew.
    ///
    /// # Errors
    /// [`ObjectError`] when no reader would accept the entry.
    pub fn sign(&self, recovery: &Recovery) -> Result<Signed<Recovery>, ObjectError> {
        self.0.try_sign(recovery)
    }

    /// The public half, which the genesis or the last recovery names.
    #[must_use]
    pub fn public(&self) -> IdentityKey {
        self.0.public()
    }
}
