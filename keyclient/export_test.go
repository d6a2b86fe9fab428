package keyclient

// KMSKeySource is where the parser of kms://cluster-kms finds the key.
func KMSKeySource(u URI) (string, error) {
	_, params, err := parseURI("kms", u)
	if err != nil {
		return "", err
	}
	kms, err := parseCluster(params)
	return string(kms.Master.Source), err
}

var AskOn = askOn
