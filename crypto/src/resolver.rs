//! The primitives of suite 1 for snow, over keys that wipe themselves.
//!
//! snow's own resolver wipes nothing and accepts an all-zero Diffie-Hellman result. What snow
//! itself keeps unwiped all the same (chaining key, psk, copies of derived keys on the stack while
//! a handshake runs) is named in THREAT_MODEL.md.

use std::sync::{Arc, Mutex};

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, Tag, UnboundKey};
use blake2::{Blake2s256, Digest};
use connect_spec::limits::TAG_BYTES;
use rand_core::CryptoRng;
use snow::{
    Error,
    params::{CipherChoice, DHChoice, HashChoice},
    resolvers::CryptoResolver,
    types::{Cipher, Dh, Hash, Random},
};
use zeroize::{Zeroize, Zeroizing};

use crate::{
    kdf::{BLOCK_BYTES, HASH_BYTES, hmac},
    kem,
    secret::{self, Secret},
};

/// Resolves X25519, ChaCha20-Poly1305 and BLAKE2s, and nothing else.
pub(crate) struct Resolver(pub(crate) EphemeralSlot);

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(self.0.clone()))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        matches!(choice, DHChoice::Curve25519).then(|| Box::<X25519>::default() as Box<dyn Dh>)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        matches!(choice, HashChoice::Blake2s).then(|| Box::<Blake2s>::default() as Box<dyn Hash>)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        matches!(choice, CipherChoice::ChaChaPoly)
            .then(|| Box::<ChaChaPoly>::default() as Box<dyn Cipher>)
    }
}

/// The randomness of one handshake: the ephemeral secret, put in just before it is used.
///
/// snow owns its random source and asks it once for each side; a source that borrows the caller's
/// generator cannot be owned. An empty slot is an error, never a weak key.
#[derive(Clone, Default)]
pub(crate) struct EphemeralSlot(Arc<Mutex<Option<Secret<32>>>>);

impl EphemeralSlot {
    pub(crate) fn fill(&self, rng: &mut impl CryptoRng) {
        *self.0.lock().expect("nothing panics while it holds this lock") =
            Some(secret::random(rng));
    }
}

impl Random for EphemeralSlot {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), Error> {
        let secret = self.0.lock().map_err(|_| Error::Rng)?.take().ok_or(Error::Rng)?;
        if dest.len() != secret.len() {
            return Err(Error::Rng);
        }
        dest.copy_from_slice(secret.as_slice());
        Ok(())
    }
}

#[derive(Default)]
struct X25519 {
    secret: Zeroizing<[u8; 32]>,
    public: [u8; 32],
}

impl Dh for X25519 {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        32
    }

    fn priv_len(&self) -> usize {
        32
    }

    fn set(&mut self, secret: &[u8]) {
        self.secret.copy_from_slice(secret);
        self.public = kem::x25519_public(&self.secret);
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), Error> {
        rng.try_fill_bytes(self.secret.as_mut_slice())?;
        self.public = kem::x25519_public(&self.secret);
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        &self.public
    }

    fn privkey(&self) -> &[u8] {
        self.secret.as_slice()
    }

    fn dh(&self, public: &[u8], out: &mut [u8]) -> Result<(), Error> {
        let public = *public.first_chunk().ok_or(Error::Dh)?;
        let shared = kem::x25519(&self.secret, public).ok_or(Error::Dh)?;
        out.get_mut(..shared.len()).ok_or(Error::Dh)?.copy_from_slice(shared.as_slice());
        Ok(())
    }
}

/// The key is inside the cipher, which wipes it when it is replaced or dropped: aws-lc overwrites all
/// memory that it frees.
///
/// Every byte of every tunnel goes through here twice, so the implementation was chosen by
/// measurement among those that wipe: ARCHITECTURE.md, "Choices".
pub(crate) struct ChaChaPoly(LessSafeKey);

impl ChaChaPoly {
    pub(crate) fn new(key: &[u8; 32]) -> Self {
        let key = UnboundKey::new(&CHACHA20_POLY1305, key).expect("the key has 32 bytes");
        Self(LessSafeKey::new(key))
    }

    /// Seals `bytes` in place, without associated data; returns the tag.
    pub(crate) fn seal(&self, counter: u64, bytes: &mut [u8]) -> Tag {
        self.0
            .seal_in_place_separate_tag(nonce(counter), Aad::empty(), bytes)
            .expect("a record is far below the cipher's limit of 256 GiB")
    }

    /// Opens `sealed`, ciphertext and tag, in place; `None` when it does not open.
    pub(crate) fn open<'s>(&self, counter: u64, sealed: &'s mut [u8]) -> Option<&'s mut [u8]> {
        self.0.open_in_place(nonce(counter), Aad::empty(), sealed).ok()
    }
}

impl Default for ChaChaPoly {
    fn default() -> Self {
        Self::new(&[0; 32])
    }
}

/// Noise specification revision 34, section 12.3.
fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

impl Cipher for ChaChaPoly {
    fn name(&self) -> &'static str {
        "ChaChaPoly"
    }

    fn set(&mut self, key: &[u8; 32]) {
        *self = Self::new(key);
    }

    fn encrypt(&self, counter: u64, authtext: &[u8], plaintext: &[u8], out: &mut [u8]) -> usize {
        let (ciphertext, rest) = out.split_at_mut(plaintext.len());
        let tag = &mut rest[..TAG_BYTES];
        self.0
            .seal_out_of_place_scatter(
                nonce(counter),
                Aad::from(authtext),
                plaintext,
                ciphertext,
                &[],
                tag,
            )
            .expect("a Noise message is far below the cipher's limit of 256 GiB");
        plaintext.len() + TAG_BYTES
    }

    fn decrypt(
        &self,
        counter: u64,
        authtext: &[u8],
        message: &[u8],
        out: &mut [u8],
    ) -> Result<usize, Error> {
        let (ciphertext, tag) = message.split_last_chunk::<TAG_BYTES>().ok_or(Error::Decrypt)?;
        let out = out.get_mut(..ciphertext.len()).ok_or(Error::Decrypt)?;
        self.0
            .open_separate_gather(nonce(counter), Aad::from(authtext), ciphertext, tag, out)
            .map_err(|_| Error::Decrypt)?;
        Ok(ciphertext.len())
    }
}

/// The hasher wipes its state when it is replaced or dropped.
#[derive(Default)]
struct Blake2s(Blake2s256);

impl Hash for Blake2s {
    fn name(&self) -> &'static str {
        "BLAKE2s"
    }

    fn block_len(&self) -> usize {
        BLOCK_BYTES
    }

    fn hash_len(&self) -> usize {
        HASH_BYTES
    }

    fn reset(&mut self) {
        self.0 = Blake2s256::new();
    }

    fn input(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    fn result(&mut self, out: &mut [u8]) {
        let mut digest = std::mem::take(&mut self.0).finalize();
        out[..HASH_BYTES].copy_from_slice(&digest);
        digest.as_mut_slice().zeroize();
    }

    // snow's own `hmac` and `hkdf` leave keys on the stack.

    fn hmac(&mut self, key: &[u8], data: &[u8], out: &mut [u8]) {
        let mut mac = Zeroizing::new([0; HASH_BYTES]);
        hmac(key, &[data], &mut mac);
        out[..HASH_BYTES].copy_from_slice(mac.as_slice());
    }

    fn hkdf(
        &mut self,
        chaining_key: &[u8],
        input: &[u8],
        outputs: usize,
        out1: &mut [u8],
        out2: &mut [u8],
        out3: &mut [u8],
    ) {
        let mut key = Zeroizing::new([0; HASH_BYTES]);
        hmac(chaining_key, &[input], &mut key);
        let mut block = Zeroizing::new([0; HASH_BYTES]);
        for (number, out) in (1u8..).zip([out1, out2, out3]).take(outputs) {
            let previous = block.clone();
            let previous = if number == 1 { &[][..] } else { previous.as_slice() };
            hmac(key.as_slice(), &[previous, &[number]], &mut block);
            out[..HASH_BYTES].copy_from_slice(block.as_slice());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use snow::Builder;

    use super::*;
    use crate::transport::Transport;

    #[test]
    fn an_all_zero_shared_secret_is_an_error() {
        let mut dh = X25519::default();
        dh.set(&[7; 32]);
        let order_8 = "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800";
        let mut low = [0; 32];
        hex::decode_to_slice(order_8, &mut low).unwrap();
        for public in [[0; 32], low] {
            assert!(matches!(dh.dh(&public, &mut [0; 32]), Err(Error::Dh)));
        }
    }

    /// One side of the public vector, with its ephemeral key in the slot.
    fn side(vector: &Value, name: &str) -> Builder<'static> {
        let bytes = |field: &str| {
            let digits = vector[format!("{name}_{field}")].as_str().unwrap_or_default();
            hex::decode(digits).unwrap()
        };
        let slot = EphemeralSlot::default();
        let ephemeral: [u8; 32] = bytes("ephemeral").try_into().unwrap();
        *slot.0.lock().unwrap() = Some(secret::boxed(&ephemeral));
        let psk = hex::decode(vector[format!("{name}_psks")][0].as_str().unwrap()).unwrap();
        let psk: &'static [u8; 32] = Box::leak(psk.into_boxed_slice().try_into().unwrap());
        let params = vector["protocol_name"].as_str().unwrap().parse().unwrap();
        let builder = Builder::with_resolver(params, Box::new(Resolver(slot)))
            .prologue(bytes("prologue").leak())
            .and_then(|builder| builder.local_private_key(bytes("static").leak()))
            .and_then(|builder| builder.psk(2, psk))
            .unwrap();
        match bytes("remote_static") {
            remote if remote.is_empty() => builder,
            remote => builder.remote_public_key(remote.leak()).unwrap(),
        }
    }

    #[test]
    fn the_public_vector_of_our_pattern_holds() {
        let file = include_str!("../tests/noise-cacophony.json");
        let file: Value = serde_json::from_str(file).unwrap();
        let vector = &file["vectors"][0];
        let mut initiator = side(vector, "init").build_initiator().unwrap();
        let mut responder = side(vector, "resp").build_responder().unwrap();
        let messages: Vec<(Vec<u8>, Vec<u8>)> = vector["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|message| {
                let bytes = |field: &str| hex::decode(message[field].as_str().unwrap()).unwrap();
                (bytes("payload"), bytes("ciphertext"))
            })
            .collect();
        let (mut sent, mut read) = (vec![0; 4096], vec![0; 4096]);
        let length = initiator.write_message(&messages[0].0, &mut sent).unwrap();
        assert_eq!(sent[..length], messages[0].1);
        let length = responder.read_message(&messages[0].1, &mut read).unwrap();
        assert_eq!(read[..length], messages[0].0);
        let length = responder.write_message(&messages[1].0, &mut sent).unwrap();
        assert_eq!(sent[..length], messages[1].1);
        let length = initiator.read_message(&messages[1].1, &mut read).unwrap();
        assert_eq!(read[..length], messages[1].0);
        let ends = [Transport::new(initiator), Transport::new(responder)];
        for end in &ends {
            assert_eq!(hex::encode(end.handshake_hash()), vector["handshake_hash"]);
        }
        let mut ends = ends.map(Transport::split);
        for (number, (payload, ciphertext)) in messages[2..].iter().enumerate() {
            let (from, to) = (number % 2, 1 - number % 2);
            let mut record = payload.clone();
            ends[from].0.seal(&mut record, 0).unwrap();
            assert_eq!(record, *ciphertext);
            assert_eq!(ends[to].1.open(&mut record).unwrap(), payload.as_slice());
        }
        assert_eq!(messages.len(), 6);
    }

    #[test]
    fn randomness_is_given_once() {
        let mut slot = EphemeralSlot::default();
        assert!(slot.try_fill_bytes(&mut [0; 32]).is_err());
        slot.fill(&mut crate::test_world::TestRng::new("slot"));
        assert!(slot.try_fill_bytes(&mut [0; 32]).is_ok());
        assert!(slot.try_fill_bytes(&mut [0; 32]).is_err());
    }

    #[test]
    fn nothing_but_suite_1_resolves() {
        let resolver = Resolver(EphemeralSlot::default());
        assert!(resolver.resolve_dh(&DHChoice::Curve448).is_none());
        assert!(resolver.resolve_hash(&HashChoice::SHA256).is_none());
        assert!(resolver.resolve_cipher(&CipherChoice::AESGCM).is_none());
    }
}
