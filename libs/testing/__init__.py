"""What tests stand on: real servers on free ports, given/when/then for domains, contract suites."""
