//! The lighthouse's options: as typed on a command line, and as checked values.

use std::time::Duration;

use clap::Parser;

/// Runs the lighthouse, which decides which replica groups take part in each step.
#[derive(Clone, Debug, Parser)]
#[command(name = "torchft_lighthouse", version)]
pub struct Cli {
    /// Address to listen on, host:port; [::] takes IPv4 as well, port 0 takes a free port.
    #[arg(long, default_value = "[::]:29510", value_name = "HOST:PORT")]
    pub bind: String,

    /// Fewest replica groups that may form a quorum; at least 1.
    #[arg(long = "min_replicas", alias = "min-replicas", value_name = "GROUPS",
          value_parser = clap::value_parser!(u64).range(1..=MOST_REPLICAS))]
    pub min_replicas: u64,

    /// How long a quorum waits for replica groups that are alive but have not asked yet.
    #[arg(long = "join_timeout_ms", alias = "join-timeout-ms", default_value_t = 60_000,
          value_name = "MS", value_parser = clap::value_parser!(u64).range(0..=MOST_MS))]
    pub join_timeout_ms: u64,

    /// Accepted for existing scripts; without effect, since a quorum is decided on each event.
    #[arg(long = "quorum_tick_ms", alias = "quorum-tick-ms", default_value_t = 100,
          value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=MOST_MS))]
    pub quorum_tick_ms: u64,

    /// A replica group that has sent no heartbeat for this long counts as dead; at least 1.
    #[arg(long = "heartbeat_timeout_ms", alias = "heartbeat-timeout-ms", default_value_t = 5_000,
          value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=MOST_MS))]
    pub heartbeat_timeout_ms: u64,
}

const MOST_REPLICAS: u64 = 1 << 20;
/// One week.
const MOST_MS: u64 = 7 * 24 * 3600 * 1000;

/// The options of a lighthouse.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LighthouseOptions {
    /// Address to listen on, `host:port`.
    pub bind: String,
    /// Fewest replica groups that may form a quorum.
    pub min_replicas: u64,
    /// How long a quorum waits for groups that are alive but have not asked yet.
    pub join_timeout: Duration,
    /// A group that has sent no heartbeat for this long counts as dead.
    pub heartbeat_timeout: Duration,
}

/// A number outside its range, given from Python (clap checks those on a command line).
#[derive(Debug, thiserror::Error)]
#[error("{name} is {given}, but must be from {least} to {most}")]
pub struct OutOfRange {
    name: &'static str,
    given: i64,
    least: u64,
    most: u64,
}

impl LighthouseOptions {
    /// Checks numbers as Python gives them.
    ///
    /// # Errors
    /// [`OutOfRange`], naming the argument, the value and the range.
    pub fn checked(
        bind: String,
        min_replicas: i64,
        join_timeout_ms: i64,
        quorum_tick_ms: i64,
        heartbeat_timeout_ms: i64,
    ) -> Result<Self, OutOfRange> {
        within("quorum_tick_ms", quorum_tick_ms, 1, MOST_MS)?;
        Ok(Self {
            bind,
            min_replicas: within("min_replicas", min_replicas, 1, MOST_REPLICAS)?,
            join_timeout: ms(within("join_timeout_ms", join_timeout_ms, 0, MOST_MS)?),
            heartbeat_timeout: ms(within(
                "heartbeat_timeout_ms",
                heartbeat_timeout_ms,
                1,
                MOST_MS,
            )?),
        })
    }
}

impl From<Cli> for LighthouseOptions {
    fn from(cli: Cli) -> Self {
        Self {
            bind: cli.bind,
            min_replicas: cli.min_replicas,
            join_timeout: ms(cli.join_timeout_ms),
            heartbeat_timeout: ms(cli.heartbeat_timeout_ms),
        }
    }
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn within(name: &'static str, given: i64, least: u64, most: u64) -> Result<u64, OutOfRange> {
    match u64::try_from(given) {
        Ok(value) if (least..=most).contains(&value) => Ok(value),
        _ => Err(OutOfRange {
            name,
            given,
            least,
            most,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_those_of_existing_scripts() {
        let cli = Cli::parse_from(["x", "--min_replicas", "2"]);
        assert_eq!(cli.bind, "[::]:29510");
        assert_eq!((cli.join_timeout_ms, cli.quorum_tick_ms), (60_000, 100));
        assert_eq!(cli.heartbeat_timeout_ms, 5_000);
    }

    #[test]
    fn out_of_range_names_the_flag_and_the_range() {
        for args in [["x", "--min_replicas", "0"], ["x", "--min_replicas", "-1"]] {
            let error = Cli::try_parse_from(args)
                .expect_err("out of range")
                .to_string();
            assert!(error.contains("--min_replicas"), "{error}");
        }
        let error = LighthouseOptions::checked("a:1".into(), 0, 0, 1, 1).expect_err("0 replicas");
        assert_eq!(
            error.to_string(),
            "min_replicas is 0, but must be from 1 to 1048576"
        );
    }
}
