//! What a connected agent does about trust: it keeps its log and the hub's one, takes part in epochs,
//! bears witness, and, if it is a signer, closes invites that are over.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use connect_spec::{
    bytes::Blob,
    control::{Reply, Request},
    ids::AgentId,
    limits::{BEAT_INTERVAL, BEAT_STALE},
    log::Beat,
    objects::AgentRole,
    signed::Signed,
    trust::{Presented, VerifiedPeer},
};
use tokio::{sync::Notify, time::timeout};

use crate::{
    agent::Core,
    audit::remember_audit,
    clock,
    directory::{Directory, unexpected_reply},
    error::{Error, ErrorKind, Result},
    govern::Governor,
    identity::Identity,
    io::hub::Session,
};

/// The secrets of an epoch that nobody has made available yet are asked for so often.
const EPOCH_RETRY: Duration = Duration::from_secs(5);

/// Until the next try after one that failed.
const RETRY: Duration = Duration::from_secs(30);

/// Keeps everything up to date until the session ends; `hint` says that the hub has news.
pub(crate) async fn keep(core: Arc<Core>, session: Arc<Session>, hint: Arc<Notify>) {
    let mut published = core.workspace.identity().epochs.current().number;
    let mut begun = None;
    loop {
        let due = begun.is_none_or(|begun: Instant| begun.elapsed() >= BEAT_INTERVAL);
        if due {
            begun = Some(Instant::now());
        }
        let kept = round(&core, &session, &mut published, due).await;
        if let Err(error) = &kept {
            if error.kind == ErrorKind::TrustViolation {
                tracing::error!(event = "hub_log", %error, "the hub's word does not hold; it is not heeded");
            } else {
                tracing::debug!(%error, "the trust log was not compared");
            }
        }
        let wait = match kept {
            Ok(Epoch::Held) => BEAT_INTERVAL,
            Ok(Epoch::Missing) => EPOCH_RETRY,
            Err(_) => RETRY,
        };
        // Whether it is news or time: the next round finds out.
        let _ = timeout(wait, hint.notified()).await;
    }
}

/// Whether the secrets of the current epoch are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Epoch {
    Held,
    Missing,
}

async fn round(
    core: &Arc<Core>,
    session: &Arc<Session>,
    published: &mut u32,
    due: bool,
) -> Result<Epoch> {
    let synced = core.workspace.sync(session).await;
    // A hub that lies about the log is not heeded in that, and all else goes on.
    if let Err(error) = &synced
        && error.kind != ErrorKind::TrustViolation
    {
        return Err(error.clone());
    }
    let held = core.workspace.fetch_epoch(session).await?;
    let current = core.workspace.identity().epochs.current().number;
    if held && *published != current {
        core.publish_all(session).await?;
        *published = current;
        core.workspace.wrap_missing(session).await?;
    } else if due {
        core.workspace.wrap_missing(session).await?;
    }
    if due {
        exchange_beats(core, session).await?;
        close_due(core, session).await;
    }
    core.look_at_shares(session).await?;
    synced.map(|()| if held { Epoch::Held } else { Epoch::Missing })
}

/// Closes invites that are over, where this agent may.
async fn close_due(core: &Arc<Core>, session: &Arc<Session>) {
    let directory = Directory::new(core.workspace.clone(), session.clone());
    // Most agents are no signers, and some signers want a passphrase, which nobody is here to give.
    let nobody = || Err(Error::new(ErrorKind::Refused, "the signer key is under a passphrase"));
    let Ok(governor) = Governor::new(directory, nobody) else {
        return;
    };
    match governor.close_due().await {
        Ok(0) => {}
        Ok(count) => tracing::info!(count, "closed invites that are over"),
        Err(error) => tracing::warn!(%error, "invites that are over were not closed"),
    }
}

/// Says what this agent knows, if others rely on it, and hears what others do.
async fn exchange_beats(core: &Core, session: &Session) -> Result<()> {
    let identity = core.workspace.identity();
    let is_witness = !core.exposer.all().is_empty() || is_signer(&identity);
    let mine = is_witness.then(|| {
        let beat = identity.signing.sign(&Beat {
            workspace_id: identity.workspace_id(),
            agent_id: identity.agent_id,
            head: identity.trust.head(),
            time: clock::now(),
        });
        Blob(beat.encode())
    });
    let Reply::Beats { beats, audit } = session.request(Request::Beats { mine }).await? else {
        return Err(unexpected_reply());
    };
    if let Some(head) = audit {
        remember_audit(core.workspace.home(), head)?;
    }
    let now = Instant::now();
    for shown in beats {
        let Ok(beat) = Signed::<Beat>::decode(&shown.beat.0) else {
            continue;
        };
        let Ok(presented) = Presented::from_blobs(&shown.presented) else {
            continue;
        };
        let Some(witness) = verify_beat(&identity, &beat, presented) else {
            tracing::warn!(event = "bad_beat", "the hub shows a beat that does not hold");
            continue;
        };
        // A head that is not in the own log is no witness for it.
        if core.workspace.knows(&beat.object().head) {
            core.fresh().handle_beat(now, witness, beat.object().time);
        }
    }
    let age = core.beat_age(None);
    if age.is_some_and(|age| age > BEAT_STALE) {
        tracing::warn!(
            event = "stale",
            age_s = age.map(|age| age.as_secs()),
            "no witness confirmed the trust log for long: the hub may be holding news back"
        );
    }
    Ok(())
}

/// The witness, if the beat is the word of another member.
pub(crate) fn verify_beat(
    identity: &Identity,
    beat: &Signed<Beat>,
    presented: Presented,
) -> Option<AgentId> {
    let object = beat.object();
    if object.workspace_id != identity.workspace_id() || object.agent_id == identity.agent_id {
        return None;
    }
    let witness = identity.trust.verify_peer(object.agent_id, presented, clock::now()).ok()?;
    // A guest is an outsider, who may side with the hub.
    if witness.certificate().role == AgentRole::Guest {
        return None;
    }
    beat.verify_by(&witness.identity_key()).ok()?;
    Some(witness.agent_id())
}

fn is_signer(identity: &Identity) -> bool {
    identity.own_signer_keys().any(|key| identity.trust.is_signer(&key))
}

/// Whether the state of the trust log lets this agent open a tunnel with a peer at all.
///
/// # Errors
/// [`ErrorKind::Refused`] when this version cannot read the log; under the policy `strict` also when the
/// log forked, or nobody but the peer confirmed it lately.
pub(crate) async fn check_policy(
    core: &Core,
    session: &Session,
    identity: &Identity,
    peer: &VerifiedPeer,
) -> Result<()> {
    let trust = &identity.trust;
    if trust.is_frozen() {
        return Err(Error::new(
            ErrorKind::Refused,
            "the trust log holds an entry that this version cannot read",
        )
        .hint("update `connect`"));
    }
    if trust.is_forked() {
        if trust.policy().strict {
            return Err(Error::new(
                ErrorKind::Refused,
                "the trust log forked, and the policy is strict",
            )
            .hint("an owner settles it: `connect trust settle`"));
        }
        tracing::warn!(event = "fork", "the trust log forked; a tunnel is opened none the less");
    }
    if trust.policy().strict && is_stale(core, identity, peer) {
        // A witness may have come online since the beats were last asked for.
        exchange_beats(core, session).await?;
    }
    if trust.policy().strict && is_stale(core, identity, peer) {
        return Err(Error::new(
            ErrorKind::Refused,
            "no witness confirmed the trust log within the last hour, and the policy is strict",
        )
        .hint("is another agent that exposes or signs online? `connect status` shows the age"));
    }
    Ok(())
}

/// Whether news could have been held back: nobody but the peer confirmed the log lately, and there is
/// somebody else who could have changed it.
fn is_stale(core: &Core, identity: &Identity, peer: &VerifiedPeer) -> bool {
    let founder = peer.founder_key();
    let between_us = identity.trust.signers().all(|(key, _)| {
        key == peer.identity_key()
            || Some(key) == founder
            || identity.own_signer_keys().any(|own| own == key)
    });
    let fresh = core.beat_age(Some(peer.agent_id())).is_some_and(|age| age <= BEAT_STALE);
    !between_us && !fresh
}
