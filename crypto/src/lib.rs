//! The secret half of the protocol: keys, signing, sealing, the handshake and the record transport.
//!
//! Everything is sans IO. Randomness is an argument, time does not occur. Deliberately absent: tokio,
//! sockets, files, the clock, and any judgement of who is a member, which is `connect_spec::trust`.
//! The hub is never built on this crate. Start reading at [`handshake`], then [`transport`]; what
//! lies at rest is in [`keys`], [`custody`], [`epoch`], [`names`] and [`invite`].
//!
//! Secrets wipe themselves on drop, are never cloned or compared, and print as `Type(..)`.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod custody;
pub mod epoch;
mod error;
pub mod founding;
pub mod handshake;
pub mod invite;
mod kdf;
mod kem;
pub mod keys;
pub mod names;
mod resolver;
mod secret;
pub mod transport;
pub mod words;

pub use error::CryptoError;

// The world of the integration tests, for tests that need a hostile peer's view of the inside.
#[cfg(test)]
extern crate self as connect_crypto;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod test_world;
