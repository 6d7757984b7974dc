//! The commands about shares, of those who give them and of those who come by them.

use connect_agent::{
    Directory, Error, ErrorKind, Home, Result, ServiceInfo,
    local::{self, Command as Ask},
};

use crate::{
    cli,
    commands::govern,
    output::{self, JoinedShare, Output},
    passphrase::Source,
    suggest,
};

pub(crate) async fn share(
    home: &Home,
    share: cli::Share,
    passphrase: &Source,
    output: Output,
) -> Result<()> {
    let governor = govern(home, passphrase).await?;
    let cli::Share { services, expires, name, uses } = share;
    let label = match name {
        Some(label) => label,
        None => services[0].as_str().parse().expect("a name is a label"),
    };
    let shared = governor.share(&services, &label, expires, uses).await;
    output.shared(&suggest::for_share(home, &services, shared).await?);
    Ok(())
}

pub(crate) async fn list(home: &Home, output: Output) -> Result<()> {
    output::log_to_stderr("warn");
    let own = home.load()?;
    let is_guest = own.share_id().is_some();
    // A guest is shown nobody's shares but its own.
    let given = match is_guest {
        true => Vec::new(),
        false => connect_agent::shares(&Directory::open(home).await?).await?,
    };
    let mut joined = Vec::new();
    for share in home.shares()? {
        joined.extend(JoinedShare::of(&share.load()?));
    }
    joined.extend(JoinedShare::of(&own));
    output.shares(&given, &joined);
    Ok(())
}

pub(crate) async fn unshare(
    home: &Home,
    share: &str,
    passphrase: &Source,
    output: Output,
) -> Result<()> {
    let governor = govern(home, passphrase).await?;
    let (share, seq) = governor.unshare(share).await?;
    output.signed(seq, format_args!("The share {} is over; its guests are cut off.", share.label));
    Ok(())
}

pub(crate) async fn leave(home: &Home, share: &str, output: Output) -> Result<()> {
    output::log_to_stderr("warn");
    let own = home.load()?;
    if own.is_share(share) {
        return Err(Error::new(
            ErrorKind::Usage,
            format_args!("`{}` belongs to that guest and to nobody else", home.dir().display()),
        )
        .hint("to leave the share, `connect down`, and remove the directory"));
    }
    let asked = local::ask(home, &Ask::Leave { share: share.to_owned() }).await?;
    if asked.is_none() {
        home.leave(share)?;
    }
    output.note("This home is no guest of that share any more.");
    Ok(())
}

/// The services of the home's workspace, and those of the shares that it joined.
pub(crate) async fn services(home: &Home) -> Result<Vec<ServiceInfo>> {
    let mut all = Directory::open(home).await?.services().await?;
    for share in home.shares()? {
        let listed = async { Directory::open(&share).await?.services().await };
        match listed.await {
            Ok(services) => all.extend(services),
            // One share that is over, or whose hub is away, must not hide all else.
            Err(error) => {
                let dir = share.dir().display();
                tracing::warn!(%dir, %error, "the services of a share are left out");
            }
        }
    }
    Ok(all)
}
