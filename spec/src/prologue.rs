//! The prologue: everything that both ends must agree on before a handshake can succeed.

use crate::{
    encoding::Encoding,
    ids::{AgentId, ChannelId, CredentialId, ServiceId, TunnelId, WorkspaceId},
    objects::SUITE_1,
};

/// Which secret the psk mixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Realm {
    /// The workspace's realm secret M.
    Member,
    /// The secret derived from a share.
    Share,
}

impl Realm {
    /// The number of the realm in the prologue and the psk.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Member => 1,
            Self::Share => 2,
        }
    }
}

/// The fields of the prologue. PROTOCOL.md, "Handshake".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prologue {
    /// The workspace.
    pub workspace_id: WorkspaceId,
    /// The tunnel.
    pub tunnel_id: TunnelId,
    /// The service.
    pub service_id: ServiceId,
    /// The reacher.
    pub initiator: AgentId,
    /// The exposer.
    pub responder: AgentId,
    /// Zeros for members, the credential id for guests.
    pub share_id: CredentialId,
    /// The channel that the tunnel carries.
    pub channel_id: ChannelId,
    /// Which tunnel of the channel this is.
    pub tunnel_no: u32,
    /// Which handshake of the tunnel this is; 0 is the one on the control channel.
    pub rekey: u32,
    /// Handshake hash of the one before; zeros when `rekey` is 0.
    pub previous_hash: [u8; 32],
    /// Which secret the psk mixes.
    pub realm: Realm,
    /// How records travel.
    pub encoding: Encoding,
}

/// Version of the tunnel protocol.
const TUNNEL_VERSION: u8 = 1;
/// First bytes of every prologue.
const LABEL: &[u8; 17] = b"connect/v1 tunnel";

impl Prologue {
    /// Length of the encoding in bytes.
    pub const BYTES: usize = 191;

    /// Encodes the prologue: fixed fields in a fixed order, so that no two prologues look alike.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let parts: [&[u8]; 16] = [
            LABEL,
            &[0],
            &SUITE_1.to_be_bytes(),
            &self.workspace_id.0,
            &self.tunnel_id.0,
            &self.service_id.0,
            &self.initiator.0,
            &self.responder.0,
            &self.share_id.0,
            &self.channel_id.0,
            &self.tunnel_no.to_be_bytes(),
            &self.rekey.to_be_bytes(),
            &self.previous_hash,
            &[self.realm.number()],
            &[self.encoding.number()],
            &[TUNNEL_VERSION],
        ];
        parts.concat().try_into().expect("the fields have fixed lengths that add up to 191")
    }
}
