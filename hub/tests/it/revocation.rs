//! What the trust log does to agents at the hub: who is closed out, at once and for good, who is not, and
//! how a certificate follows another.

use std::time::{Duration, Instant};

use connect_spec::{
    audit::Scope,
    bytes::Blob,
    control::{ErrorCode, FromHub, Reply, Request, SealedRecord, SessionKind, close},
    encoding::Encoding,
    ids::{AgentId, CredentialId, LookupTag, ServiceId},
    limits::MAX_BEATS,
    log::{Change, Head, LogEntry, ObjectHash},
    objects::SignerRole,
};
use futures_util::SinkExt as _;
use tokio_tungstenite::tungstenite::Message;

use crate::{
    client::{Agent, Control, Invite, Workspace, error_code, expose, new_key, public, record},
    process::HubProcess,
    template::place,
    tunnels::{SERVICE, TAG, World, dial, expect_close, open},
};

/// A service that no share names.
const OTHER: ServiceId = ServiceId([0xee; 16]);

fn revoke(agent: &Agent, below_serial: Option<u64>) -> Change {
    Change::RevokeAgent { agent_id: agent.id, below_serial }
}

fn close_credential(id: CredentialId, keep: Vec<ObjectHash>) -> Change {
    Change::CloseCredential { credential_id: id, keep }
}

/// Appends one entry by the founder.
async fn append(
    control: &mut Control,
    workspace: &Workspace,
    after: Head,
    change: Change,
) -> LogEntry {
    let entry = workspace.entry(after, vec![change]);
    assert_eq!(control.append(std::slice::from_ref(&entry)).await, Reply::Done);
    entry
}

async fn expect_welcome(control: &mut Control, agent: &Agent) {
    let welcome = control.try_log_in(agent, |_| ()).await;
    assert!(matches!(welcome, FromHub::Welcome { .. }), "{welcome:?}");
}

async fn log_in(hub: &HubProcess, agent: &Agent) -> Control {
    let mut control = Control::connect(hub.agents).await;
    expect_welcome(&mut control, agent).await;
    control
}

async fn denied(hub: &HubProcess, agent: &Agent) -> ErrorCode {
    error_code(Control::connect(hub.agents).await.try_log_in(agent, |_| ()).await)
}

async fn redeem_denied(hub: &HubProcess, workspace: &Workspace, invite: &Invite) -> ErrorCode {
    error_code(Control::connect(hub.agents).await.redeem(workspace, invite).await)
}

#[tokio::test]
async fn a_revoked_agent_loses_everything_at_once() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let (mut reacher, mut exposer) = world.tunnel(Encoding::Binary).await;
    reacher.send(Message::binary(vec![1])).await.unwrap();
    let (mut other_reacher, mut other_exposer) = world.tunnel(Encoding::Base64).await;
    // Half-way: one end is there and waits for the other, whose ticket is out.
    let (half, lost) = world.tickets(Encoding::Base64).await;
    let base64 = Encoding::Base64.subprotocol();
    let mut half = dial(&world.dialer, Some(&half), base64).await.unwrap();
    let World { hub, dialer, workspace, exposer: victim, mut exposing, mut reaching, .. } = world;
    let mut command = Control::connect(hub.agents).await;
    let welcome = command.try_log_in(&victim, |login| login.session = SessionKind::Command).await;
    assert!(matches!(welcome, FromHub::Welcome { .. }));
    // Asked and not answered.
    let request = Request::OpenTunnel(open(200, SERVICE, victim.id));
    let asked = reaching.ask(request).await;
    assert!(matches!(exposing.receive().await, FromHub::IncomingTunnel { .. }));

    // Another agent appends, and goes.
    let bystander = workspace.founder();
    let mut appending = log_in(&hub, &bystander).await;
    let entry = workspace.entry(workspace.head(), vec![revoke(&victim, None)]);
    let started = Instant::now();
    assert_eq!(appending.append(std::slice::from_ref(&entry)).await, Reply::Done);
    drop(appending);
    exposing.expect_close(close::REVOKED).await;
    command.expect_close(close::REVOKED).await;
    assert!(matches!(
        futures_util::StreamExt::next(&mut exposer).await,
        Some(Ok(Message::Binary(_)))
    ));
    for socket in [&mut reacher, &mut exposer, &mut other_reacher, &mut other_exposer, &mut half] {
        expect_close(socket, close::REVOKED).await;
    }
    assert!(started.elapsed() < Duration::from_secs(5));
    match reaching.receive().await {
        FromHub::Reply { id, reply: Reply::Error(report) } => {
            assert_eq!((id, report.code), (asked, ErrorCode::Offline));
        }
        other => panic!("{other:?}"),
    }
    reaching.expect_head(entry.head()).await;
    assert!(dial(&dialer, Some(&lost), base64).await.is_err());

    // Its name is free, and it does not come back, not even with a new certificate.
    let lookup = Request::Lookup { tag: TAG };
    let nothing = Reply::Services { services: vec![], more: false };
    assert_eq!(reaching.request(lookup).await, nothing);
    reaching.done(expose(SERVICE, TAG, 1)).await;
    assert_eq!(denied(&hub, &victim).await, ErrorCode::Revoked);
    let renewed = workspace.renewed(&victim, &workspace.signer, 9);
    assert_eq!(denied(&hub, &renewed).await, ErrorCode::Revoked);
    let certify = Request::Certify { certificate: renewed.certificate() };
    assert_eq!(reaching.refused(certify).await, ErrorCode::Revoked);
    // Listed it is: agents judge each other.
    match reaching.request(Request::Agents { after: None }).await {
        Reply::Agents { agents, .. } => {
            let found = agents.iter().find(|agent| agent.agent_id == victim.id).unwrap();
            assert!(!found.online);
        }
        other => panic!("{other:?}"),
    }
    hub.stop().await;
}

#[tokio::test]
async fn whoever_joined_by_what_is_closed_is_out_but_for_whom_it_keeps() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let mut control = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;
    let (invite, unused) = (workspace.invite(9, None), workspace.invite(1, None));
    control.done(invite.request()).await;
    control.done(unused.request()).await;
    let (kept, dropped) = (workspace.joiner(&invite), workspace.joiner(&invite));
    let mut staying = log_in(&hub, &kept).await;
    let mut leaving = log_in(&hub, &dropped).await;
    leaving.done(expose(SERVICE, TAG, 1)).await;
    staying.done(Request::PublishAgent { record: record(1) }).await;
    let listed = async |control: &mut Control| match control
        .request(Request::Credentials { after: None })
        .await
    {
        Reply::Credentials { credentials, more: false } => credentials,
        other => panic!("{other:?}"),
    };
    let used = |invite: &Invite, listed: &[connect_spec::control::ListedCredential]| {
        let wire: Blob = invite.credential.encode().into();
        listed.iter().find(|row| row.credential == wire).map(|row| row.used)
    };
    let open = listed(&mut control).await;
    assert_eq!((used(&invite, &open), used(&unused, &open)), (Some(2), Some(0)));

    let change = close_credential(invite.id(), vec![kept.certificate_hash()]);
    let entry = append(&mut control, &workspace, workspace.head(), change).await;
    leaving.expect_close(close::REVOKED).await;
    staying.expect_head(entry.head()).await;
    staying.done(expose(SERVICE, TAG, 1)).await;
    assert_eq!(used(&invite, &listed(&mut control).await), None);

    assert_eq!(redeem_denied(&hub, &workspace, &invite).await, ErrorCode::InviteExpired);
    assert_eq!(denied(&hub, &workspace.joiner(&invite)).await, ErrorCode::InviteExpired);
    assert_eq!(denied(&hub, &dropped).await, ErrorCode::Revoked);
    drop(log_in(&hub, &kept).await);
    // One that was closed before it was stored.
    let late = workspace.invite(1, None);
    let change = close_credential(late.id(), vec![]);
    append(&mut control, &workspace, entry.head(), change).await;
    assert_eq!(control.refused(late.request()).await, ErrorCode::Forbidden);
    hub.stop().await;
}

#[tokio::test]
async fn a_signer_that_is_removed_takes_along_what_is_not_kept() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let admin = new_key();
    let (kept, dropped) = (workspace.founder(), workspace.founder());
    let kept = workspace.renewed(&kept, &admin, 0);
    let dropped = workspace.renewed(&dropped, &admin, 0);
    let mut control = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;
    assert_eq!(denied(&hub, &kept).await, ErrorCode::UnknownWorkspace);
    let add = Change::AddSigner { key: public(&admin), role: SignerRole::Admin };
    let entry = append(&mut control, &workspace, workspace.head(), add).await;
    let mut staying = log_in(&hub, &kept).await;
    let leaving = log_in(&hub, &dropped).await;
    let keep = vec![kept.certificate_hash()];
    let remove = Change::RemoveSigner { key: public(&admin), keep };
    let entry = append(&mut control, &workspace, entry.head(), remove).await;
    leaving.expect_close(close::REVOKED).await;
    staying.expect_head(entry.head()).await;
    staying.done(expose(SERVICE, TAG, 1)).await;
    assert_eq!(denied(&hub, &dropped).await, ErrorCode::Unauthorized);
    hub.stop().await;
}

#[tokio::test]
async fn a_hub_that_forgot_takes_in_whom_the_log_keeps() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let mut control = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;
    // The hub never heard of the invite, nor of those who joined by it.
    let invite = workspace.invite(1, None);
    let (kept, also_kept, other) =
        (workspace.joiner(&invite), workspace.joiner(&invite), workspace.joiner(&invite));
    assert_eq!(denied(&hub, &kept).await, ErrorCode::InviteUnknown);
    let mut keep = vec![kept.certificate_hash(), also_kept.certificate_hash()];
    keep.sort();
    let change = close_credential(invite.id(), keep);
    append(&mut control, &workspace, workspace.head(), change).await;

    let mut first = log_in(&hub, &kept).await;
    drop(log_in(&hub, &also_kept).await);
    drop(log_in(&hub, &kept).await);
    first.socket.close(None).await.unwrap();
    assert_eq!(denied(&hub, &other).await, ErrorCode::InviteExpired);
    assert_eq!(redeem_denied(&hub, &workspace, &invite).await, ErrorCode::InviteExpired);
    // Others see the whole chain.
    match control.request(Request::Agents { after: None }).await {
        Reply::Agents { agents, .. } => {
            let found = agents.iter().find(|agent| agent.agent_id == kept.id).unwrap();
            let credential = found.presented.credential.clone();
            assert_eq!(credential, Some(invite.credential.encode().into()));
        }
        other => panic!("{other:?}"),
    }
    hub.stop().await;
}

#[tokio::test]
async fn a_new_certificate_waits_for_its_agent() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let mut control = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;
    let invite = workspace.invite(1, None);
    control.done(invite.request()).await;
    let old = workspace.joiner(&invite);
    let online = log_in(&hub, &old).await;
    let certify = |agent: &Agent| Request::Certify { certificate: agent.certificate() };

    let stranger = workspace.founder();
    assert_eq!(
        control.refused(certify(&workspace.renewed(&stranger, &workspace.signer, 1))).await,
        ErrorCode::NotFound
    );
    for (agent, code) in [
        (workspace.renewed(&old, &new_key(), 1), ErrorCode::Forbidden),
        (workspace.renewed(&old, &workspace.signer, 0), ErrorCode::Stale),
        (old.clone(), ErrorCode::Forbidden),
    ] {
        assert_eq!(control.refused(certify(&agent)).await, code);
    }
    let new = workspace.renewed(&old, &workspace.signer, 2);
    control.done(certify(&new)).await;
    online.expect_close(close::RESTARTING).await;
    control.done(certify(&new)).await;
    let older = workspace.renewed(&old, &workspace.signer, 1);
    assert_eq!(control.refused(certify(&older)).await, ErrorCode::Stale);

    // The old one is revoked before the agent comes back: it gets in by the new one all the same.
    append(&mut control, &workspace, workspace.head(), revoke(&old, Some(2))).await;
    let mut back = Control::connect(hub.agents).await;
    // Not without the proof.
    let other = workspace.founder().login(&back.authority, &back.nonce);
    let refused = back.try_log_in(&old, |login| login.signature = other.signature).await;
    assert_eq!(error_code(refused), ErrorCode::Unauthorized);
    let mut back = Control::connect(hub.agents).await;
    let renewed = back.try_log_in(&old, |_| ()).await;
    assert_eq!(renewed, FromHub::Renewed { certificate: new.certificate() });
    expect_welcome(&mut back, &new).await;
    back.done(Request::PublishAgent { record: record(1) }).await;

    // An agent that lost it again is given it again; one that insists is refused.
    let mut again = Control::connect(hub.agents).await;
    let renewed = again.try_log_in(&old, |_| ()).await;
    assert_eq!(renewed, FromHub::Renewed { certificate: new.certificate() });
    assert_eq!(error_code(again.try_log_in(&old, |_| ()).await), ErrorCode::Stale);
    // The old one is out for good where nothing newer holds.
    let entry = workspace.entry(
        workspace.entry(workspace.head(), vec![revoke(&old, Some(2))]).head(),
        vec![revoke(&old, Some(3))],
    );
    assert_eq!(control.append(&[entry]).await, Reply::Done);
    back.expect_close(close::REVOKED).await;
    assert_eq!(denied(&hub, &new).await, ErrorCode::Revoked);
    assert_eq!(denied(&hub, &old).await, ErrorCode::Revoked);
    hub.stop().await;
}

#[tokio::test]
async fn beats_are_of_others_and_signed_by_them() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let agents: Vec<Agent> = (0..MAX_BEATS + 2).map(|_| workspace.founder()).collect();
    let mut controls = Vec::new();
    for agent in &agents {
        controls.push(Control::log_in(hub.agents, &workspace, agent).await);
    }
    let head = workspace.head();
    async fn exchange(control: &mut Control, mine: Option<Blob>) -> Vec<Blob> {
        match control.request(Request::Beats { mine }).await {
            Reply::Beats { beats, .. } => beats.into_iter().map(|listed| listed.beat).collect(),
            other => panic!("{other:?}"),
        }
    }
    let old = agents[0].beat(head, 100);
    let new = agents[0].beat(head, 200);
    assert_eq!(exchange(&mut controls[0], Some(old.clone())).await, []);
    assert_eq!(exchange(&mut controls[1], None).await, std::slice::from_ref(&old));
    assert_eq!(exchange(&mut controls[0], Some(new.clone())).await, []);
    assert_eq!(exchange(&mut controls[0], Some(old)).await, []);
    assert_eq!(exchange(&mut controls[1], None).await, std::slice::from_ref(&new));

    let stranger = Workspace::new().founder();
    let posing = |agent: &Agent| {
        let mut agent = agent.clone();
        agent.id = agents[1].id;
        agent
    };
    let mut long = new.0.clone();
    long.resize(2000, 0);
    for (mine, code) in [
        (agents[0].beat(head, 300), ErrorCode::Forbidden),
        (posing(&agents[0]).beat(head, 300), ErrorCode::Forbidden),
        (posing(&stranger).beat(head, 300), ErrorCode::Forbidden),
        (long.into(), ErrorCode::BadRequest),
        (vec![].into(), ErrorCode::BadRequest),
    ] {
        let request = Request::Beats { mine: Some(mine) };
        assert_eq!(controls[1].refused(request).await, code);
    }
    for (agent, control) in agents.iter().zip(&mut controls).skip(1) {
        exchange(control, Some(agent.beat(head, 1))).await;
    }
    // The newest of others, and no more than an answer holds.
    let shown = exchange(&mut controls[1], None).await;
    assert_eq!(shown.len(), MAX_BEATS);
    assert_eq!(shown[0], agents[MAX_BEATS + 1].beat(head, 1));
    assert!(!shown.contains(&agents[1].beat(head, 1)) && !shown.contains(&new));

    // With the last session the hub forgets them.
    for mut control in controls {
        control.socket.close(None).await.unwrap();
        while futures_util::StreamExt::next(&mut control.socket).await.is_some() {}
    }
    let mut control = log_in(&hub, &agents[1]).await;
    assert_eq!(exchange(&mut control, None).await, [0_u8; 0].map(|_| Blob::default()));
    hub.stop().await;
}

#[tokio::test]
async fn a_guest_has_no_part_in_the_workspace() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let founder = workspace.founder();
    let mut control = Control::log_in(hub.agents, &workspace, &founder).await;
    let share = workspace.share(SERVICE);
    control.done(share.request()).await;
    let guest = workspace.joiner(&share);
    let mut visiting = log_in(&hub, &guest).await;
    let beat = guest.beat(workspace.head(), 1);
    for request in [
        Request::Beats { mine: Some(beat) },
        Request::MissingWraps { epoch: 0 },
        Request::StoreWraps { wraps: vec![] },
        Request::Credentials { after: None },
        Request::Shares { after: None },
        Request::Agents { after: None },
        Request::CreateApiKey { scopes: vec![Scope::Read], valid_for: 60 },
        Request::ApiKeys,
        expose(SERVICE, TAG, 1),
        Request::Certify {
            certificate: workspace.renewed(&founder, &workspace.signer, 1).certificate(),
        },
        expose(OTHER, LookupTag([7; 16]), 1),
    ] {
        assert_eq!(visiting.refused(request).await, ErrorCode::Forbidden);
    }
    // It needs the log as all others do, and no wrap.
    assert_eq!(visiting.log(&[]).await, (workspace.head(), vec![]));
    match control.request(Request::MissingWraps { epoch: 0 }).await {
        Reply::MissingWraps { agents, credentials } => {
            let agents: Vec<AgentId> = agents.iter().map(|agent| agent.agent_id).collect();
            assert_eq!((agents, credentials), (vec![founder.id], vec![]));
        }
        other => panic!("{other:?}"),
    }
    // Of the services it sees those of its share, and them as their exposer sealed them for it.
    let listed = |reply| match reply {
        Reply::Services { services, more: false } => services,
        other => panic!("{other:?}"),
    };
    control.done(expose(SERVICE, TAG, 1)).await;
    control.done(expose(OTHER, LookupTag([9; 16]), 1)).await;
    assert_eq!(listed(visiting.request(Request::Services { after: None }).await), []);
    let publish = |share_id, service_id, counter| Request::ExposeToShare {
        share_id,
        service_id,
        tag: LookupTag([8; 16]),
        record: SealedRecord { epoch: 0, counter, sealed: vec![3; 40].into() },
    };
    control.done(publish(share.id(), SERVICE, 2)).await;
    assert_eq!(control.refused(publish(share.id(), SERVICE, 1)).await, ErrorCode::Stale);
    for (share_id, service_id) in [(share.id(), OTHER), (CredentialId([1; 16]), SERVICE)] {
        let refused = control.refused(publish(share_id, service_id, 3)).await;
        assert_eq!(refused, ErrorCode::NotFound);
    }
    assert_eq!(visiting.refused(publish(share.id(), SERVICE, 3)).await, ErrorCode::NotFound);
    let shown = listed(visiting.request(Request::Services { after: None }).await);
    assert_eq!(shown.len(), 1);
    let shown = (shown[0].service_id, shown[0].agent_id, shown[0].record.sealed.clone());
    assert_eq!(shown, (SERVICE, founder.id, vec![3; 40].into()));
    for (tag, found) in [(LookupTag([8; 16]), 1), (TAG, 0), (LookupTag([9; 16]), 0)] {
        assert_eq!(listed(visiting.request(Request::Lookup { tag }).await).len(), found);
    }
    assert_eq!(listed(control.request(Request::Lookup { tag: LookupTag([8; 16]) }).await), []);
    // Members list it with its record; a share made later is announced to those whom it names.
    match control.request(Request::Shares { after: None }).await {
        Reply::Credentials { credentials, more: false } => {
            assert_eq!(credentials.len(), 1);
            assert_eq!(credentials[0].record, Some(vec![7; 64].into()));
        }
        other => panic!("{other:?}"),
    }
    let second = workspace.share(SERVICE);
    let id = control.ask(second.request()).await;
    assert_eq!(control.receive().await, FromHub::ShareMade { share_id: second.id() });
    assert_eq!(control.receive().await, FromHub::Reply { id, reply: Reply::Done });
    // With the service, what guests see of it is gone.
    control.done(Request::Unexpose { service_id: SERVICE }).await;
    assert_eq!(listed(visiting.request(Request::Services { after: None }).await), []);
    // Closing the share is how it is revoked.
    let change = close_credential(share.id(), vec![]);
    append(&mut control, &workspace, workspace.head(), change).await;
    visiting.expect_close(close::REVOKED).await;
    hub.stop().await;
}
