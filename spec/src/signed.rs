//! The envelope of every signed object: `[bstr body, [[key 32, signature 64], …]]`.
//!
//! Signatures and hashes cover the body as received; nothing is ever encoded again.
//! PROTOCOL.md, "Signed objects".

use minicbor::{Decoder, Encoder};

use crate::{
    cbor::{self, CborError, infallible},
    hash::hash,
    keys::{BadSignature, IdentityKey, Signature},
    limits::MAX_SIGNATURES,
};

/// Why bytes are not a well-formed signed object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// The envelope or the body is not canonical, or a field is wrong.
    #[error(transparent)]
    Cbor(#[from] CborError),
    /// The body is longer than its kind allows.
    #[error("longer than {0} bytes")]
    TooLong(usize),
    /// The envelope is not `[body, [[key, signature], …]]` with 1 to 16 distinct ascending keys.
    #[error("envelope is malformed")]
    Envelope,
    /// The object's version is not one that this program understands.
    #[error("version {0} is not supported")]
    Version(u64),
    /// A value outside the set that its field allows.
    #[error("field {0} has a value that is not allowed")]
    Value(u64),
}

/// A body that can be signed: what it is called, how long it may be, how it is read and written.
pub trait Body: Sized {
    /// The kind in the signed text and the label of its hash.
    const KIND: &'static str;
    /// Most bytes of a body.
    const MAX_BYTES: usize;

    /// Reads a body; the bytes may be anything.
    ///
    /// # Errors
    /// [`ObjectError`]: every deviation from the one allowed spelling.
    fn decode(body: &[u8]) -> Result<Self, ObjectError>;

    /// Writes the canonical body.
    fn encode(&self) -> Vec<u8>;
}

/// An object as it travels: parsed and well-formed, its signatures **not** yet verified.
///
/// [`Signed::verify_by`] checks a signature; `trust` turns objects into proofs.
#[derive(Clone, PartialEq, Eq)]
pub struct Signed<T> {
    object: T,
    body: Vec<u8>,
    signatures: Vec<(IdentityKey, Signature)>,
}

impl<T: Body> Signed<T> {
    /// Puts a freshly signed body into its envelope. Signing itself is `connect-crypto`'s.
    ///
    /// # Errors
    /// [`ObjectError`] when `body` or the list of signatures breaks a rule of this format.
    pub fn new(
        body: Vec<u8>,
        mut signatures: Vec<(IdentityKey, Signature)>,
    ) -> Result<Self, ObjectError> {
        signatures.sort_by_key(|(key, _)| *key);
        if body.len() > T::MAX_BYTES {
            return Err(ObjectError::TooLong(T::MAX_BYTES));
        }
        let ascending = signatures.is_sorted_by(|(left, _), (right, _)| left < right);
        if signatures.is_empty() || signatures.len() > MAX_SIGNATURES || !ascending {
            return Err(ObjectError::Envelope);
        }
        Ok(Self { object: T::decode(&body)?, body, signatures })
    }

    /// Reads an object from the wire.
    ///
    /// # Errors
    /// [`ObjectError`]: every deviation from the one allowed spelling.
    pub fn decode(wire: &[u8]) -> Result<Self, ObjectError> {
        // The envelope adds at most a few bytes a signature: refuse a huge input before walking it.
        if wire.len() > T::MAX_BYTES + 16 + MAX_SIGNATURES * 128 {
            return Err(ObjectError::TooLong(T::MAX_BYTES));
        }
        cbor::check(wire)?;
        let (body, signatures) =
            decode_envelope(&mut Decoder::new(wire)).map_err(|_| ObjectError::Envelope)?;
        if !signatures.is_sorted_by(|(left, _), (right, _)| left < right) {
            return Err(ObjectError::Envelope);
        }
        Self::new(body, signatures)
    }

    /// Writes the object as it travels.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut wire = Vec::with_capacity(self.body.len() + 8 + 104 * self.signatures.len());
        let mut encoder = Encoder::new(&mut wire);
        infallible(encoder.array(2).map(|_| ()));
        infallible(encoder.bytes(&self.body).map(|_| ()));
        infallible(encoder.array(self.signatures.len() as u64).map(|_| ()));
        for (key, signature) in &self.signatures {
            infallible(encoder.array(2).map(|_| ()));
            infallible(encoder.bytes(&key.0).map(|_| ()));
            infallible(encoder.bytes(&signature.0).map(|_| ()));
        }
        wire
    }

    /// `H(kind, body)`: names the object whatever its signatures are.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        hash(T::KIND, &[&self.body])
    }

    /// The body as received: what is signed and hashed.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The parsed body. Nothing in it is proven before a signature is.
    #[must_use]
    pub fn object(&self) -> &T {
        &self.object
    }

    /// The signatures, by ascending key, not verified.
    #[must_use]
    pub fn signatures(&self) -> &[(IdentityKey, Signature)] {
        &self.signatures
    }

    /// Verifies that `key`, and nobody else, signed this object.
    ///
    /// # Errors
    /// [`BadSignature`] when the one signature is by another key or does not hold.
    pub fn verify_by(&self, key: &IdentityKey) -> Result<(), BadSignature> {
        match self.signatures.as_slice() {
            [(signer, signature)] if signer == key => key.verify(T::KIND, &self.body, signature),
            _ => Err(BadSignature),
        }
    }

    /// Verifies every signature that the object carries.
    ///
    /// # Errors
    /// [`BadSignature`] when one of them does not hold.
    pub fn verify_all(&self) -> Result<(), BadSignature> {
        self.signatures
            .iter()
            .try_for_each(|(key, signature)| key.verify(T::KIND, &self.body, signature))
    }
}

type Envelope = (Vec<u8>, Vec<(IdentityKey, Signature)>);

fn decode_envelope(decoder: &mut Decoder<'_>) -> Result<Envelope, minicbor::decode::Error> {
    let malformed = || minicbor::decode::Error::message("envelope");
    let expect_array = |decoder: &mut Decoder<'_>, length: Option<u64>| {
        let found = decoder.array()?.ok_or_else(malformed)?;
        if length.is_some_and(|length| length != found) { Err(malformed()) } else { Ok(found) }
    };
    expect_array(decoder, Some(2))?;
    let body = decoder.bytes()?.to_vec();
    let count = expect_array(decoder, None)?;
    if count > MAX_SIGNATURES as u64 {
        return Err(malformed());
    }
    let mut signatures = Vec::new();
    for _ in 0..count {
        expect_array(decoder, Some(2))?;
        let key = IdentityKey::try_from(decoder.bytes()?).map_err(|_| malformed())?;
        let signature = Signature::try_from(decoder.bytes()?).map_err(|_| malformed())?;
        signatures.push((key, signature));
    }
    Ok((body, signatures))
}

impl<T: std::fmt::Debug> std::fmt::Debug for Signed<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Signed").field(&self.object).finish()
    }
}
