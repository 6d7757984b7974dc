//! The secrets that members share, and their wraps to one key. PROTOCOL.md, "Epochs".

use chacha20poly1305::{
    ChaCha20Poly1305, KeyInit,
    aead::{Aead, AeadInOut, Nonce, inout::InOutBuf},
};
use connect_spec::{
    control::EpochWrap,
    hash::hash,
    ids::{CredentialId, WorkspaceId},
    keys::{ML_KEM_768_CT_BYTES, WrapPublicKey},
    limits::TAG_BYTES,
};
use rand_core::CryptoRng;
use zeroize::Zeroizing;

use crate::{
    error::CryptoError,
    kdf::kdf,
    kem::{self, Ciphertext},
    keys::WrapKeypair,
    secret::{self, redacted, secret_newtype},
};

secret_newtype!(
    /// The realm secret M: mixed into every handshake of the workspace, never rotated.
    RealmSecret
);
secret_newtype!(
    /// The name key source W: names and records are sealed under it; a new one at each revocation.
    NameSource
);

secret_newtype!(
    /// What the guests of a share hold in place of M and W. Every member can derive it.
    ShareSecret
);

impl ShareSecret {
    /// `KDF(M, "share " || share_id)`: it opens nothing outside this share, and M does not follow from it.
    #[must_use]
    pub fn derive(realm: &RealmSecret, share: &CredentialId) -> Self {
        Self(secret::boxed(&kdf(realm.as_bytes(), &[b"share ".as_slice(), &share.0].concat())))
    }

    /// The realm secret and name source of the share: `KDF(secret, "share realm")` and
    /// `KDF(secret, "share names")`. They are used as those of an epoch are, and never change.
    #[must_use]
    pub fn secrets(&self) -> EpochSecrets {
        let part = |label: &[u8]| secret::boxed(&kdf(self.as_bytes(), label));
        EpochSecrets {
            realm: RealmSecret(part(b"share realm")),
            names: NameSource(part(b"share names")),
        }
    }
}

/// What an epoch consists of.
pub struct EpochSecrets {
    /// The realm secret M.
    pub realm: RealmSecret,
    /// The name key source W.
    pub names: NameSource,
}

redacted!(EpochSecrets);

/// `M || W`.
const SECRETS_BYTES: usize = 64;
/// `ephemeral 32 || ct 1088 || ciphertext 80`.
const WRAP_BYTES: usize = 32 + ML_KEM_768_CT_BYTES + SECRETS_BYTES + TAG_BYTES;

impl EpochSecrets {
    /// Draws both: what a founder does.
    #[must_use]
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        Self { realm: RealmSecret::generate(rng), names: NameSource::generate(rng) }
    }

    /// The secrets of the next epoch: the same M, another W.
    #[must_use]
    pub fn next(&self, rng: &mut impl CryptoRng) -> Self {
        let realm = RealmSecret(secret::boxed(self.realm.as_bytes()));
        Self { realm, names: NameSource::generate(rng) }
    }

    /// Takes `M || W` out of custody.
    #[must_use]
    pub fn from_bytes(bytes: Zeroizing<[u8; SECRETS_BYTES]>) -> Self {
        let (realm, names) = bytes.split_at(32);
        let half = |half: &[u8]| secret::boxed(half.try_into().expect("half of 64 is 32"));
        Self { realm: RealmSecret(half(realm)), names: NameSource(half(names)) }
    }

    /// `M || W`, for custody.
    #[must_use]
    pub fn to_bytes(&self) -> Zeroizing<[u8; SECRETS_BYTES]> {
        let mut bytes = Zeroizing::new([0; SECRETS_BYTES]);
        bytes[..32].copy_from_slice(self.realm.as_bytes().as_slice());
        bytes[32..].copy_from_slice(self.names.as_bytes().as_slice());
        bytes
    }

    /// `H("epoch", M || W)`: what the trust log says of the epoch.
    #[must_use]
    pub fn commit(&self) -> [u8; 32] {
        hash("epoch", &[self.to_bytes().as_slice()])
    }

    /// Wraps the secrets to one key. The wrap is public; the hub stores it.
    ///
    /// # Errors
    /// [`CryptoError::Key`] when `to` holds a key with which no secret can be agreed.
    ///
    /// # Security
    /// `to` must hash to what a verified NoiseKey or credential names.
    pub fn wrap(
        &self,
        workspace: &WorkspaceId,
        epoch: u32,
        to: &WrapPublicKey,
        rng: &mut impl CryptoRng,
    ) -> Result<EpochWrap, CryptoError> {
        let ephemeral = secret::random(rng);
        let (ciphertext, kem_secret) = kem::encapsulate(&to.ml_kem, rng).ok_or(CryptoError::Key)?;
        let place = Place {
            workspace,
            epoch,
            recipient: to,
            ephemeral: &kem::x25519_public(&ephemeral),
            ciphertext: &ciphertext,
        };
        let dh = kem::x25519(&ephemeral, to.x25519).ok_or(CryptoError::Key)?;
        let sealed = place
            .cipher(&dh, &kem_secret)
            .encrypt(&Nonce::<ChaCha20Poly1305>::default(), self.to_bytes().as_slice())
            .expect("64 bytes are no length that the cipher refuses");
        let blob = [place.ephemeral.as_slice(), ciphertext.as_slice(), &sealed].concat();
        Ok(EpochWrap { epoch, sealed: blob.into() })
    }

    /// Opens a wrap to `keys` and holds it against `commit`.
    ///
    /// # Errors
    /// [`CryptoError::Open`] when it is for another key, epoch or workspace, or was changed;
    /// [`CryptoError::Misplaced`] when the trust log speaks of other secrets.
    ///
    /// # Security
    /// `commit` must come from the verified trust log: anybody can make a wrap that opens.
    pub fn open(
        wrap: &EpochWrap,
        workspace: &WorkspaceId,
        keys: &WrapKeypair,
        commit: &[u8; 32],
    ) -> Result<Self, CryptoError> {
        let blob = &wrap.sealed.0;
        if blob.len() != WRAP_BYTES {
            return Err(CryptoError::Open);
        }
        let (ephemeral, rest) = blob.split_first_chunk::<32>().ok_or(CryptoError::Open)?;
        let (ciphertext, sealed) =
            rest.split_first_chunk::<ML_KEM_768_CT_BYTES>().ok_or(CryptoError::Open)?;
        let (sealed, tag) = sealed.split_last_chunk::<TAG_BYTES>().ok_or(CryptoError::Open)?;
        let place = Place {
            workspace,
            epoch: wrap.epoch,
            recipient: &keys.public(),
            ephemeral,
            ciphertext,
        };
        let dh = kem::x25519(keys.x25519(), *ephemeral).ok_or(CryptoError::Open)?;
        let kem_secret = keys.decapsulator().decapsulate(ciphertext);
        let mut bytes = Zeroizing::new([0; SECRETS_BYTES]);
        let buffer = InOutBuf::new(sealed, bytes.as_mut_slice()).map_err(|_| CryptoError::Open)?;
        place
            .cipher(&dh, &kem_secret)
            .decrypt_inout_detached(
                &Nonce::<ChaCha20Poly1305>::default(),
                &[],
                buffer,
                &(*tag).into(),
            )
            .map_err(|_| CryptoError::Open)?;
        let secrets = Self::from_bytes(bytes);
        if secrets.commit() == *commit { Ok(secrets) } else { Err(CryptoError::Misplaced) }
    }
}

/// Everything public that the key of a wrap is bound to.
struct Place<'p> {
    workspace: &'p WorkspaceId,
    epoch: u32,
    recipient: &'p WrapPublicKey,
    ephemeral: &'p [u8; 32],
    ciphertext: &'p Ciphertext,
}

impl Place<'_> {
    /// The cipher of this wrap alone, so that its nonce can be zero.
    fn cipher(&self, dh: &[u8; 32], kem_secret: &[u8; 32]) -> ChaCha20Poly1305 {
        let key = Zeroizing::new(hash(
            "wrap",
            &[
                &self.workspace.0,
                &self.epoch.to_be_bytes(),
                &self.recipient.x25519,
                self.ephemeral,
                dh,
                kem_secret,
                &hash("ek", &[self.recipient.ml_kem.as_slice()]),
                &hash("ct", &[self.ciphertext]),
            ],
        ));
        ChaCha20Poly1305::new_from_slice(key.as_slice()).expect("the key has 32 bytes")
    }
}
