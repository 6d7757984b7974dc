//! What can go wrong with sealed things at rest.

use connect_spec::signed::ObjectError;

/// Why something could not be sealed or opened. Says no more than its cause needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CryptoError {
    /// A public key with which no secret can be agreed.
    #[error("public key is not usable")]
    Key,
    /// It does not open: another key, another place, or changed on the way.
    #[error("does not open")]
    Open,
    /// It opens, but is not what its place says: another object, epoch, counter or signer.
    #[error("what was sealed does not belong here")]
    Misplaced,
    /// It opens to something malformed, or what is to be sealed is malformed or too long.
    #[error(transparent)]
    Object(#[from] ObjectError),
}
