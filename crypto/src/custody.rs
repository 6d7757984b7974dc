//! A signer's key at rest, sealed under a passphrase: argon2id, then XChaCha20-Poly1305.
//!
//! ```text
//! version u8 = 1 | public 32 | memory_kib u32 | passes u32 | lanes u32 | salt 16 | nonce 24 | sealed 32 + 16
//! key = argon2id(passphrase, salt, memory, passes, lanes)
//! AAD = "connect/v1 custody" || 0x00 || workspace_id 32 || everything before `sealed`
//! ```
//!
//! The cost is in the header, so that it can change: what was sealed with another one still opens.

use argon2::{Algorithm, Argon2, Block, Params, Version};
use chacha20poly1305::{
    KeyInit, XChaCha20Poly1305,
    aead::{Aead, AeadInOut, Payload, inout::InOutBuf},
};
use connect_spec::{ids::WorkspaceId, keys::IdentityKey, limits::TAG_BYTES};
use rand_core::CryptoRng;
use zeroize::{Zeroize, Zeroizing};

use crate::{keys::SigningKey, secret::redacted};

/// First bytes of the associated data.
const LABEL: &[u8] = b"connect/v1 custody";
const VERSION: u8 = 1;
const SALT_BYTES: usize = 16;
const NONCE_BYTES: usize = 24;
/// Everything that is not sealed.
const HEADER_BYTES: usize = 1 + 32 + 3 * 4 + SALT_BYTES + NONCE_BYTES;
/// Fewer characters are guessed whatever each guess costs.
const MIN_PASSPHRASE_CHARS: usize = 8;
/// More bytes are a file that is no passphrase.
const MAX_PASSPHRASE_BYTES: usize = 1024;

/// Why a passphrase or what it is to open was refused. Says nothing of either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CustodyError {
    /// The passphrase is too short.
    #[error("a passphrase has at least {MIN_PASSPHRASE_CHARS} characters")]
    TooShort,
    /// The passphrase is too long.
    #[error("a passphrase has at most {MAX_PASSPHRASE_BYTES} bytes")]
    TooLong,
    /// What is to be opened is no sealed key.
    #[error("the sealed key is malformed")]
    Malformed,
    /// Computing the key would take more memory or time than is allowed.
    #[error("the sealed key asks for an unreasonable amount of work")]
    Cost,
    /// It does not open: the passphrase is wrong, or the file belongs elsewhere or was changed.
    #[error("the passphrase is wrong")]
    Open,
}

/// What a person remembers.
pub struct Passphrase(Zeroizing<String>);

impl Passphrase {
    /// Takes what was typed or read, without its line break.
    ///
    /// # Errors
    /// [`CustodyError::TooShort`], [`CustodyError::TooLong`].
    pub fn new(text: Zeroizing<String>) -> Result<Self, CustodyError> {
        if text.len() > MAX_PASSPHRASE_BYTES {
            return Err(CustodyError::TooLong);
        }
        if text.chars().count() < MIN_PASSPHRASE_CHARS {
            return Err(CustodyError::TooShort);
        }
        Ok(Self(text))
    }
}

/// What one guess at a passphrase costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over the memory.
    pub passes: u32,
    /// Lanes that can be computed beside each other.
    pub lanes: u32,
}

impl Cost {
    /// 64 MiB and three passes: the second recommendation of RFC 9106 with one lane, a fraction of a
    /// second on a small machine.
    pub const DEFAULT: Self = Self { memory_kib: 64 * 1024, passes: 3, lanes: 1 };
    /// What is still computed for a file that asks for it.
    const MAX: Self = Self { memory_kib: 1024 * 1024, passes: 32, lanes: 16 };

    fn params(self) -> Result<Params, CustodyError> {
        let Self { memory_kib, passes, lanes } = self;
        let max = Self::MAX;
        if memory_kib > max.memory_kib || passes > max.passes || lanes > max.lanes {
            return Err(CustodyError::Cost);
        }
        Params::new(memory_kib, passes, lanes, Some(32)).map_err(|_| CustodyError::Cost)
    }
}

/// A signing key that only its passphrase opens.
///
/// Holds no secret that is not sealed. Its Debug text shows whose key it is.
#[derive(Clone, PartialEq, Eq)]
pub struct SealedKey {
    public: IdentityKey,
    cost: Cost,
    bytes: Vec<u8>,
}

impl std::fmt::Debug for SealedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SealedKey").field("public", &self.public).finish_non_exhaustive()
    }
}

impl SealedKey {
    /// Seals `key`, which signs for `workspace`.
    ///
    /// # Errors
    /// [`CustodyError::Cost`].
    pub fn seal(
        key: &SigningKey,
        workspace: &WorkspaceId,
        passphrase: &Passphrase,
        cost: Cost,
        rng: &mut impl CryptoRng,
    ) -> Result<Self, CustodyError> {
        let mut random = [0; SALT_BYTES + NONCE_BYTES];
        rng.fill_bytes(&mut random);
        let parts: [&[u8]; 6] = [
            &[VERSION],
            &key.public().0,
            &cost.memory_kib.to_be_bytes(),
            &cost.passes.to_be_bytes(),
            &cost.lanes.to_be_bytes(),
            &random,
        ];
        let mut bytes = parts.concat();
        let (salt, nonce) = random.split_first_chunk().expect("16 of 40 bytes");
        let nonce: [u8; NONCE_BYTES] = nonce.try_into().expect("40 - 16 = 24");
        let sealed = cipher(passphrase, salt, cost)?
            .encrypt(
                &nonce.into(),
                Payload { msg: key.seed().as_slice(), aad: &associated_data(workspace, &bytes) },
            )
            .expect("32 bytes are no length that the cipher refuses");
        bytes.extend(sealed);
        Ok(Self { public: key.public(), cost, bytes })
    }

    /// Reads a sealed key from custody.
    ///
    /// # Errors
    /// [`CustodyError::Malformed`], [`CustodyError::Cost`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CustodyError> {
        let malformed = CustodyError::Malformed;
        if bytes.len() != HEADER_BYTES + 32 + TAG_BYTES {
            return Err(malformed);
        }
        let (&[version], rest) = bytes.split_first_chunk().ok_or(malformed)?;
        if version != VERSION {
            return Err(malformed);
        }
        let (public, rest) = rest.split_first_chunk().ok_or(malformed)?;
        let (memory_kib, rest) = rest.split_first_chunk().ok_or(malformed)?;
        let (passes, rest) = rest.split_first_chunk().ok_or(malformed)?;
        let (lanes, _) = rest.split_first_chunk().ok_or(malformed)?;
        let number = |bytes: &[u8; 4]| u32::from_be_bytes(*bytes);
        let cost =
            Cost { memory_kib: number(memory_kib), passes: number(passes), lanes: number(lanes) };
        cost.params()?;
        Ok(Self { public: IdentityKey(*public), cost, bytes: bytes.to_vec() })
    }

    /// The sealed key, for custody.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The public half, as the file says it; [`SealedKey::open`] proves it.
    #[must_use]
    pub fn public(&self) -> IdentityKey {
        self.public
    }

    /// Opens the key. Takes as long as its cost says.
    ///
    /// # Errors
    /// [`CustodyError::Open`].
    pub fn open(
        &self,
        workspace: &WorkspaceId,
        passphrase: &Passphrase,
    ) -> Result<SigningKey, CustodyError> {
        let (header, sealed) =
            self.bytes.split_at_checked(HEADER_BYTES).ok_or(CustodyError::Malformed)?;
        let (header_start, nonce) =
            header.split_last_chunk::<NONCE_BYTES>().ok_or(CustodyError::Malformed)?;
        let (_, salt) =
            header_start.split_last_chunk::<SALT_BYTES>().ok_or(CustodyError::Malformed)?;
        let (sealed, tag) =
            sealed.split_last_chunk::<TAG_BYTES>().ok_or(CustodyError::Malformed)?;
        let mut seed = Zeroizing::new([0; 32]);
        let buffer =
            InOutBuf::new(sealed, seed.as_mut_slice()).map_err(|_| CustodyError::Malformed)?;
        cipher(passphrase, salt, self.cost)?
            .decrypt_inout_detached(
                &(*nonce).into(),
                &associated_data(workspace, header),
                buffer,
                &(*tag).into(),
            )
            .map_err(|_| CustodyError::Open)?;
        let key = SigningKey::from_seed(seed);
        if key.public() == self.public { Ok(key) } else { Err(CustodyError::Open) }
    }
}

redacted!(Passphrase);

fn associated_data(workspace: &WorkspaceId, header: &[u8]) -> Vec<u8> {
    [LABEL, &[0], &workspace.0, header].concat()
}

fn cipher(
    passphrase: &Passphrase,
    salt: &[u8; SALT_BYTES],
    cost: Cost,
) -> Result<XChaCha20Poly1305, CustodyError> {
    let params = cost.params()?;
    // Our own memory, so that it is wiped.
    let mut memory = Wiped(vec![Block::new(); params.block_count()]);
    let mut key = Zeroizing::new([0; 32]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into_with_memory(
            passphrase.0.as_bytes(),
            salt,
            key.as_mut_slice(),
            &mut memory.0,
        )
        .map_err(|_| CustodyError::Cost)?;
    Ok(XChaCha20Poly1305::new_from_slice(key.as_slice()).expect("the key has 32 bytes"))
}

/// Memory of argon2, which the passphrase can be guessed from without its cost.
struct Wiped(Vec<Block>);

impl Drop for Wiped {
    fn drop(&mut self) {
        self.0.iter_mut().for_each(Zeroize::zeroize);
    }
}
