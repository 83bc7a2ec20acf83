//! The world of a transcript: one lighthouse, or one group, and a clock that the commands move.

use std::time::Duration;

mod group;
mod lighthouse;

use group::GroupWorld;
use lighthouse::LighthouseWorld;

/// One line: a verb, names, and `key=value` settings or bare wishes.
pub struct Command {
    pub verb: String,
    words: Vec<String>,
    quote: Option<String>,
}

impl Command {
    /// Reads a line. What stands between `"` is one text.
    pub fn parse(line: &str) -> Self {
        let mut parts = line.splitn(3, '"');
        let mut words = parts.next().unwrap().split_whitespace().map(String::from);
        Self {
            verb: words.next().expect("a verb"),
            words: words.collect(),
            quote: parts.next().map(String::from),
        }
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let words = self.words.iter().map(String::as_str);
        words.filter(|word| !word.contains('='))
    }

    /// The first name.
    pub fn name(&self) -> &str {
        self.names().next().expect("a name")
    }

    pub fn quote(&self) -> &str {
        self.quote.as_deref().unwrap_or_default()
    }

    pub fn says(&self, wish: &str) -> bool {
        self.names().any(|word| word == wish)
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        let mut words = self.words.iter();
        words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    pub fn number(&self, key: &str) -> Option<i64> {
        self.text(key).map(|text| text.parse().expect("a number"))
    }

    pub fn ms(&self, key: &str) -> Option<Duration> {
        self.number(key).map(|ms| Duration::from_millis(ms as u64))
    }
}

/// Nothing yet, then what the first command made.
#[derive(Default)]
pub enum World {
    #[default]
    Void,
    Lighthouse(LighthouseWorld),
    Group(GroupWorld),
}

impl World {
    /// Carries a command out; returns the lines that came of it.
    pub fn run(&mut self, command: &Command) -> Vec<String> {
        let outcome = match (command.verb.as_str(), &mut *self) {
            ("lighthouse", _) => match LighthouseWorld::new(command) {
                Ok(world) => {
                    *self = Self::Lighthouse(world);
                    return vec!["ok".into()];
                }
                Err(bad) => return vec![bad.to_string()],
            },
            ("group", _) => {
                *self = Self::Group(GroupWorld::new(command));
                return vec!["ok".into()];
            }
            (_, Self::Lighthouse(world)) => world.run(command),
            (_, Self::Group(world)) => world.run(command),
            (verb, Self::Void) => panic!("{verb}: begin with lighthouse or group"),
        };
        if outcome.is_empty() {
            vec!["ok".into()]
        } else {
            outcome
        }
    }
}
