//! What travels between agents and the hub, and how it is verified.
//!
//! Wire types and codecs, identifiers, limits, public halves of keys, and the verification of signed
//! objects. Deliberately absent: secrets, sockets, files, the clock, and anything that could open
//! ciphertext: the hub is built on this crate alone. `PROTOCOL.md` beside this crate is the
//! protocol in prose; start reading at [`objects`], then [`trust`], [`control`] and [`record`].

#![warn(missing_docs)]

pub mod audit;
pub mod bytes;
pub mod cbor;
pub mod check;
pub mod control;
pub mod encoding;
pub mod frame;
pub mod handshake;
pub mod hash;
pub mod ids;
pub mod keys;
pub mod limits;
pub mod log;
pub mod objects;
pub mod prologue;
pub mod record;
pub mod signed;
pub mod trust;
pub mod verify;
