//! A figure that is to be reached.

/// A measured value and its limit; one that wasn't measured counts as missed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Target {
    pub(crate) text: String,
    pub(crate) value: Option<f64>,
    pub(crate) limit: f64,
    pub(crate) at_most: bool,
}

impl Target {
    pub(crate) fn at_most(limit: f64, value: Option<f64>, text: String) -> Target {
        Target { text, value, limit, at_most: true }
    }

    pub(crate) fn at_least(limit: f64, value: Option<f64>, text: String) -> Target {
        Target { text, value, limit, at_most: false }
    }

    pub(crate) fn met(&self) -> bool {
        self.value.is_some_and(|value| if self.at_most { value <= self.limit } else { value >= self.limit })
    }

    /// The value for people.
    pub(crate) fn shown(&self) -> String {
        self.value.map_or("unknown".into(), |value| format!("{value:.2}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_met_by_itself_and_by_nothing_unknown() {
        assert!(Target::at_most(0.5, Some(0.5), String::new()).met());
        assert!(!Target::at_most(0.5, Some(0.51), String::new()).met());
        assert!(Target::at_least(0.95, Some(0.95), String::new()).met());
        assert!(!Target::at_least(0.95, Some(0.94), String::new()).met());
        assert!(!Target::at_most(0.5, None, String::new()).met());
    }
}
