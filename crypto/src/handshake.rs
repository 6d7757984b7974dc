//! The handshake: `Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s` with ML-KEM-768 in the psk.
//!
//! PROTOCOL.md, "Handshake". Two messages, no application data in them. Each step consumes the one
//! before; a [`Transport`] exists only for a caller that holds the [`VerifiedPeer`] of the very
//! objects that the other end presented. Nothing falls back to anything.
//!
//! ```text
//! initiate -> AwaitReply --read(message 2)--> Reply --confirm(peer)--> Transport
//! receive(message 1) -> Received --answer(peer)--> Transport, message 2
//! ```

use connect_spec::{
    handshake::Payload,
    hash::hash,
    ids::AgentId,
    keys::{ML_KEM_768_CT_BYTES, ML_KEM_768_EK_BYTES, StaticPublicKey},
    limits::MAX_HANDSHAKE_BYTES,
    log::Head,
    objects::{Attributes, SUITE_1},
    prologue::{Prologue, Realm},
    trust::{Presented, VerifiedPeer},
};
use rand_core::CryptoRng;
use snow::{Builder, HandshakeState};
use zeroize::Zeroizing;

use crate::{
    epoch::RealmSecret,
    kem::{self, Ciphertext, Decapsulator},
    keys::StaticKeypair,
    resolver::{EphemeralSlot, Resolver},
    secret::{self, Secret, redacted},
    transport::Transport,
};

const PATTERN: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
/// Where the psk goes in: at the end of message 2.
const PSK_POSITION: usize = 2;

/// Why a handshake ended. All are final: the caller begins another one, or gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// A message or its payload breaks the format.
    #[error("handshake message is malformed")]
    Malformed,
    /// A message does not open: changed, or made with another key, secret or prologue.
    #[error("handshake message does not open")]
    Decrypt,
    /// The ML-KEM key is missing, unexpected or not canonical.
    #[error("handshake has no usable ML-KEM key")]
    Kem,
    /// The verified peer is not the agent of the prologue, or did not present what was verified.
    #[error("handshake is not with the agent that was verified")]
    Peer,
    /// The static key of the handshake is not the one that the NoiseKey binds, or none at all.
    #[error("static key is not the one that was certified")]
    StaticKey,
    /// The tags and their salt do not open the certificate's hash.
    #[error("tags are not the ones that were certified")]
    Attributes,
}

/// What this agent brings to a handshake.
#[derive(Debug)]
pub struct Local<'k> {
    /// The static key, which `presented` binds.
    pub static_keypair: &'k StaticKeypair,
    /// Certificate, credential and NoiseKey.
    pub presented: &'k Presented,
    /// Opens the certificate's attrs hash.
    pub attrs: &'k Attributes,
    /// This agent's place in the trust log.
    pub head: Head,
    /// The secret of the realm that the prologue names.
    pub realm_secret: &'k RealmSecret,
}

impl Local<'_> {
    fn payload(
        &self,
        encapsulation_key: Option<kem::EncapsulationKey>,
    ) -> Result<Vec<u8>, HandshakeError> {
        if self.presented.noise_key.object().static_key != self.static_keypair.public() {
            return Err(HandshakeError::StaticKey);
        }
        let payload = Payload {
            presented: self.presented.clone(),
            attrs: self.attrs.clone(),
            head: self.head,
            encapsulation_key,
        };
        payload.encode().map_err(|_| HandshakeError::Malformed)
    }
}

fn builder<'b>(
    prologue: &'b [u8],
    local: &'b StaticKeypair,
    ephemeral: &EphemeralSlot,
) -> Builder<'b> {
    let params = PATTERN.parse().expect("snow knows this pattern");
    Builder::with_resolver(params, Box::new(Resolver(ephemeral.clone())))
        .prologue(prologue)
        .and_then(|builder| builder.local_private_key(local.secret().as_slice()))
        .expect("each is set once")
}

fn write(noise: &mut HandshakeState, payload: &[u8]) -> Result<Vec<u8>, snow::Error> {
    let mut message = vec![0; MAX_HANDSHAKE_BYTES];
    let length = noise.write_message(payload, &mut message)?;
    message.truncate(length);
    Ok(message)
}

/// Reads a message. Whatever is wrong with it, the other end is told nothing.
fn read(noise: &mut HandshakeState, message: &[u8]) -> Result<Payload, HandshakeError> {
    if message.len() > MAX_HANDSHAKE_BYTES {
        return Err(HandshakeError::Malformed);
    }
    let mut payload = vec![0; message.len()];
    let length = noise.read_message(message, &mut payload).map_err(|_| HandshakeError::Decrypt)?;
    payload.truncate(length);
    Payload::decode(&payload).map_err(|_| HandshakeError::Malformed)
}

/// `H("psk", suite || realm || realm_secret || kem_secret || H("ek", ek) || H("ct", ct))`.
fn psk(
    realm: Realm,
    realm_secret: &[u8; 32],
    kem_secret: &[u8; 32],
    encapsulation_key: &[u8; ML_KEM_768_EK_BYTES],
    ciphertext: &Ciphertext,
) -> Zeroizing<[u8; 32]> {
    Zeroizing::new(hash(
        "psk",
        &[
            &SUITE_1.to_be_bytes(),
            &[realm.number()],
            realm_secret,
            kem_secret,
            &hash("ek", &[encapsulation_key]),
            &hash("ct", &[ciphertext]),
        ],
    ))
}

/// Holds the proof against the handshake that it is to admit.
fn check_peer(
    peer: &VerifiedPeer,
    expected: AgentId,
    payload: &Payload,
    noise: &HandshakeState,
) -> Result<(), HandshakeError> {
    if peer.agent_id() != expected || *peer.presented() != payload.presented {
        return Err(HandshakeError::Peer);
    }
    if noise.get_remote_static() != Some(peer.static_key().as_bytes()) {
        return Err(HandshakeError::StaticKey);
    }
    if peer.certificate().attrs != payload.attrs.hash() {
        return Err(HandshakeError::Attributes);
    }
    Ok(())
}

/// The initiator after message 1.
pub struct AwaitReply {
    noise: HandshakeState,
    decapsulator: Decapsulator,
    encapsulation_key: kem::EncapsulationKey,
    realm: Realm,
    realm_secret: Secret<32>,
    responder: AgentId,
}

/// Begins a handshake: returns the state that awaits the reply, and message 1.
///
/// # Errors
/// [`HandshakeError::StaticKey`] when `local` presents another key than it uses, or when
/// `responder_static` is no sound key; [`HandshakeError::Malformed`] when the objects do not fit.
///
/// # Security
/// `responder_static` must come from a verified NoiseKey of the agent that the prologue names.
pub fn initiate(
    local: &Local<'_>,
    prologue: &Prologue,
    responder_static: &StaticPublicKey,
    rng: &mut impl CryptoRng,
) -> Result<(AwaitReply, Vec<u8>), HandshakeError> {
    let decapsulator = Decapsulator::generate(rng);
    let encapsulation_key = decapsulator.encapsulation_key();
    let payload = local.payload(Some(encapsulation_key.clone()))?;

    let ephemeral = EphemeralSlot::default();
    ephemeral.fill(rng);
    let encoded = prologue.encode();
    let mut noise = builder(&encoded, local.static_keypair, &ephemeral)
        .remote_public_key(responder_static.as_bytes())
        .and_then(Builder::build_initiator)
        .expect("the pattern has all that it needs");
    let message1 = write(&mut noise, &payload).map_err(|error| {
        let unsound = matches!(error, snow::Error::Dh);
        if unsound { HandshakeError::StaticKey } else { HandshakeError::Malformed }
    })?;

    let state = AwaitReply {
        noise,
        decapsulator,
        encapsulation_key,
        realm: prologue.realm,
        realm_secret: secret::boxed(local.realm_secret.as_bytes()),
        responder: prologue.responder,
    };
    Ok((state, message1))
}

impl AwaitReply {
    /// Reads message 2, which proves that the responder holds its static key and the realm secret.
    ///
    /// # Errors
    /// [`HandshakeError::Malformed`], [`HandshakeError::Decrypt`], [`HandshakeError::Kem`].
    pub fn read(mut self, message2: &[u8]) -> Result<Reply, HandshakeError> {
        let (ciphertext, message) =
            message2.split_first_chunk::<ML_KEM_768_CT_BYTES>().ok_or(HandshakeError::Malformed)?;
        let kem_secret = self.decapsulator.decapsulate(ciphertext);
        let psk =
            psk(self.realm, &self.realm_secret, &kem_secret, &self.encapsulation_key, ciphertext);
        self.noise.set_psk(PSK_POSITION, psk.as_slice()).expect("a psk of 32 bytes");
        let payload = read(&mut self.noise, message)?;
        if payload.encapsulation_key.is_some() {
            return Err(HandshakeError::Kem);
        }
        Ok(Reply { noise: self.noise, payload, responder: self.responder })
    }
}

/// The initiator after message 2, before it has judged the responder.
pub struct Reply {
    noise: HandshakeState,
    payload: Payload,
    responder: AgentId,
}

impl Reply {
    /// What the responder says of itself: for `TrustState::verify_peer`.
    #[must_use]
    pub fn payload(&self) -> &Payload {
        &self.payload
    }

    /// Ends the handshake with the peer that was verified.
    ///
    /// # Errors
    /// [`HandshakeError::Peer`], [`HandshakeError::StaticKey`], [`HandshakeError::Attributes`] when
    /// `peer` is not the proof about this very handshake.
    pub fn confirm(self, peer: &VerifiedPeer) -> Result<Transport, HandshakeError> {
        check_peer(peer, self.responder, &self.payload, &self.noise)?;
        Ok(Transport::new(self.noise))
    }
}

/// The responder after message 1. It has sent nothing.
pub struct Received {
    noise: HandshakeState,
    ephemeral: EphemeralSlot,
    payload: Payload,
    encapsulation_key: kem::EncapsulationKey,
    local_static: StaticPublicKey,
    realm: Realm,
    initiator: AgentId,
}

/// Reads message 1.
///
/// # Errors
/// [`HandshakeError::Malformed`], [`HandshakeError::Decrypt`], [`HandshakeError::Kem`].
///
/// # Security
/// Message 1 can be a replay: remember tunnel ids, and act on nothing before the first record opens.
pub fn receive(
    local_static: &StaticKeypair,
    prologue: &Prologue,
    message1: &[u8],
) -> Result<Received, HandshakeError> {
    let ephemeral = EphemeralSlot::default();
    let encoded = prologue.encode();
    let mut noise = builder(&encoded, local_static, &ephemeral)
        .build_responder()
        .expect("the pattern has all that it needs");
    let mut payload = read(&mut noise, message1)?;
    let encapsulation_key = payload.encapsulation_key.take().ok_or(HandshakeError::Kem)?;
    Ok(Received {
        noise,
        ephemeral,
        payload,
        encapsulation_key,
        local_static: local_static.public(),
        realm: prologue.realm,
        initiator: prologue.initiator,
    })
}

impl Received {
    /// What the initiator says of itself: for `TrustState::verify_peer`.
    ///
    /// Its encapsulation key is taken out: it is for [`Received::answer`] alone.
    #[must_use]
    pub fn payload(&self) -> &Payload {
        &self.payload
    }

    /// Answers the peer that was verified: returns the transport, and message 2.
    ///
    /// # Errors
    /// [`HandshakeError::Peer`], [`HandshakeError::StaticKey`], [`HandshakeError::Attributes`] when
    /// `peer` is not the proof about this very handshake; [`HandshakeError::StaticKey`] also when
    /// `local` has another static key than [`receive`] was given; [`HandshakeError::Kem`];
    /// [`HandshakeError::Malformed`] when the objects do not fit.
    pub fn answer(
        mut self,
        peer: &VerifiedPeer,
        local: &Local<'_>,
        rng: &mut impl CryptoRng,
    ) -> Result<(Transport, Vec<u8>), HandshakeError> {
        check_peer(peer, self.initiator, &self.payload, &self.noise)?;
        if local.static_keypair.public() != self.local_static {
            return Err(HandshakeError::StaticKey);
        }
        let payload = local.payload(None)?;
        let (ciphertext, kem_secret) =
            kem::encapsulate(&self.encapsulation_key, rng).ok_or(HandshakeError::Kem)?;
        let psk = psk(
            self.realm,
            local.realm_secret.as_bytes(),
            &kem_secret,
            &self.encapsulation_key,
            &ciphertext,
        );
        self.noise.set_psk(PSK_POSITION, psk.as_slice()).expect("a psk of 32 bytes");
        self.ephemeral.fill(rng);
        let message = write(&mut self.noise, &payload).map_err(|_| HandshakeError::Malformed)?;
        let message2 = [ciphertext.as_slice(), &message].concat();
        Ok((Transport::new(self.noise), message2))
    }
}

redacted!(AwaitReply, Reply, Received);

#[cfg(test)]
mod tests;
