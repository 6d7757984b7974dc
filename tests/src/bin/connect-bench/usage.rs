//! What processes use, as Linux tells it.

use std::fs;

use anyhow::Context;

/// The unit of times in /proc: the same on every machine that Linux runs on today, whatever its kernel
/// counts in.
const TICKS_PER_SECOND: f64 = 100.0;

/// Some processes, without their children: the hub's database is none of them.
#[derive(Debug)]
pub(crate) struct Processes([u32; 3]);

impl Processes {
    pub(crate) fn new(ids: [u32; 3]) -> Self {
        Self(ids)
    }

    /// CPU seconds until now, in user mode and in the kernel.
    pub(crate) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        self.sum("stat", |text| {
            // The name comes before and may hold anything; what follows it begins with field 3.
            let (_, fields) = text.rsplit_once(')')?;
            let mut times = fields.split_whitespace().skip(14 - 3);
            let user: f64 = times.next()?.parse().ok()?;
            let system: f64 = times.next()?.parse().ok()?;
            Some((user + system) / TICKS_PER_SECOND)
        })
    }

    /// Memory that is resident now, in KiB.
    pub(crate) fn memory(&self) -> anyhow::Result<f64> {
        self.status("VmRSS:")
    }

    /// The most memory that was ever resident, in KiB.
    pub(crate) fn most_memory(&self) -> anyhow::Result<f64> {
        self.status("VmHWM:")
    }

    fn status(&self, field: &str) -> anyhow::Result<f64> {
        self.sum("status", |text| {
            let line = text.lines().find_map(|line| line.strip_prefix(field))?;
            line.split_whitespace().next()?.parse().ok()
        })
    }

    fn sum(&self, file: &str, read: impl Fn(&str) -> Option<f64>) -> anyhow::Result<f64> {
        let one = |id| {
            let path = format!("/proc/{id}/{file}");
            let text = fs::read_to_string(&path);
            text.ok().and_then(|text| read(&text)).with_context(|| format!("nothing in `{path}`"))
        };
        self.0.iter().map(one).sum()
    }
}

/// Processor and number of its cores, for the heading.
pub(crate) fn machine() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown processor", |(_, model)| model.trim());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{model}, {cores} cores")
}
